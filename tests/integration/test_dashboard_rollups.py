"""History summed up into minutes and hours: each row once, whoever dies or comes late, and forgotten in time."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db.models import Sum
from django.utils import timezone

from dashboard import rollups
from dashboard.models import BatchRollup, LatencyRollup, RequestRollup, Resolution, RollupCheckpoint
from dashboard.rollups import prune_rollups, roll_up
from inference.models import BatchRecord, RequestRecord
from scheduling.audit import record_action
from scheduling.models import OperatorAction, ServiceLevel, Tenant
from tests.history_data import make_batches, make_requests

pytestmark = pytest.mark.django_db
END = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def totals(resolution: int) -> dict[str, Any]:
    of_requests = RequestRollup.objects.filter(resolution=resolution)
    return of_requests.aggregate(
        finished=Sum("finished"), failed=Sum("failed"), cancelled=Sum("cancelled"), tokens=Sum("completion_tokens")
    )


def record(num: int = 300, **options: Any) -> None:
    RequestRecord.objects.bulk_create(make_requests(num, end=END, seconds=7000, **options))


def test_every_request_is_in_one_minute_and_one_hour() -> None:
    record()
    assert roll_up(10) == 300
    tokens = RequestRecord.objects.aggregate(tokens=Sum("completion_tokens"))["tokens"]
    for resolution in Resolution.values:
        assert totals(resolution) == {"finished": 286, "failed": 6, "cancelled": 8, "tokens": tokens}
    assert RequestRollup.objects.filter(resolution=Resolution.HOUR).values("start").distinct().count() == 3
    assert sum(sum(row.e2e) for row in LatencyRollup.objects.filter(resolution=Resolution.MINUTE)) == 286
    assert roll_up(10) == 0


def test_rows_that_come_late_are_added_to_their_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollups, "ROWS", 70)
    record(100)
    roll_up(10)
    record(100, seed=2)
    roll_up(10)
    assert totals(Resolution.HOUR) == totals(Resolution.MINUTE)
    assert sum(totals(Resolution.HOUR)[state] for state in ("finished", "failed", "cancelled")) == 200
    assert RequestRollup.objects.filter(resolution=Resolution.HOUR).values("start").distinct().count() == 3


def test_a_process_that_dies_midway_or_is_overtaken_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    record(50)
    save: Callable[..., None] = rollups._save

    def die(*args: Any) -> None:
        save(*args)
        raise OSError("killed")

    monkeypatch.setattr(rollups, "_save", die)
    with pytest.raises(OSError, match="killed"):
        roll_up(10)
    assert not RequestRollup.objects.exists()

    def other_process() -> datetime:
        RollupCheckpoint.objects.filter(source="requests").update(last_id=10**6)
        return END

    monkeypatch.setattr(rollups, "_save", save)
    with monkeypatch.context() as patch:
        patch.setattr(rollups, "timezone", SimpleNamespace(now=other_process))
        assert roll_up(10) == 0
    assert not RequestRollup.objects.exists()
    assert roll_up(10) == 50
    assert totals(Resolution.MINUTE)["finished"] == 47


def test_a_request_is_judged_by_its_tenants_level_and_its_failure_is_a_miss() -> None:
    tenant = Tenant.objects.create(name="checkout")
    ServiceLevel.objects.create(tenant=tenant, priority=0, ttft_ms=1, objective_percent=90)
    ServiceLevel.objects.create(priority=0, e2e_ms=10**8)
    ServiceLevel.objects.create(priority=1, e2e_ms=10**8, objective_percent=95)
    record(400)
    roll_up(10)
    rows = RequestRollup.objects.filter(resolution=Resolution.HOUR)
    mine = rows.filter(tenant="checkout", priority=0).aggregate(
        judged=Sum("judged"), met=Sum("met"), allowed=Sum("allowed")
    )
    assert mine["judged"] > 0
    assert mine["met"] == 0
    assert mine["allowed"] == pytest.approx(mine["judged"] * 0.1)
    others = rows.filter(priority=1).aggregate(judged=Sum("judged"), met=Sum("met"), failed=Sum("failed"))
    assert others["met"] == others["judged"] - others["failed"]
    assert not rows.filter(priority=3, judged__gt=0).exists()


def test_seconds_of_replicas_add_up_and_the_largest_stays_the_largest() -> None:
    BatchRecord.objects.bulk_create(make_batches(240, end=END))
    roll_up(10)
    hours = BatchRollup.objects.filter(resolution=Resolution.HOUR)
    sums = hours.aggregate(seconds=Sum("seconds"), steps=Sum("steps"), tokens=Sum("output_tokens"))
    raw = BatchRecord.objects.aggregate(steps=Sum("steps"), tokens=Sum("output_tokens"))
    assert sums == {"seconds": 240, **raw}
    row = hours.order_by("-seconds")[0]
    assert (row.step_ms_max, row.batch_size_max) == (19.0, 16)
    assert 0.2 < row.kv_used / row.seconds < 0.7
    assert 80 <= row.utilization / row.utilization_told <= 90


def test_grains_are_forgotten_by_their_own_age() -> None:
    old = timezone.now() - timedelta(days=40)
    RequestRecord.objects.bulk_create(make_requests(20, end=old, seconds=60))
    roll_up(10)
    prune_rollups(days={Resolution.MINUTE: 30, Resolution.HOUR: 60})
    assert set(RequestRollup.objects.values_list("resolution", flat=True)) == {Resolution.HOUR}


def test_the_audit_trail_is_only_added_to_even_when_its_actor_goes() -> None:
    olga = User.objects.create_user("olga")
    row = record_action(actor=olga, action="tenant.update", target="checkout")
    for attempt in (OperatorAction.objects.all().delete, lambda: OperatorAction.objects.update(action="x"), row.delete):
        with pytest.raises(TypeError, match="never"):
            attempt()
    olga.delete()
    row.refresh_from_db()
    assert (row.actor, row.actor_name) == (None, "olga")
