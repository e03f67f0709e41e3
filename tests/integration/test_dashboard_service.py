"""The last minute's service against its targets, and refusals over time: what was counted, once, and against what."""

from datetime import UTC, datetime, timedelta

import pytest
from django.utils import timezone

from dashboard.models import RequestRollup, Resolution
from dashboard.refusals import add_refusals, read_refusals
from dashboard.rollups import roll_up
from dashboard.selectors.service import ServiceWatch
from inference.models import RequestRecord
from scheduling.models import ServiceLevel, Tenant
from tests.integration.test_dashboard_pages import get_json, signed_in

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def record(number: int, *, ended_s: float, tenant: str = "acme", ttft_s: float = 0.2, tpot_s: float = 0.05) -> None:
    first = NOW - timedelta(seconds=ended_s) - timedelta(seconds=10 * tpot_s)
    RequestRecord.objects.create(
        request_id=f"req-{number}", model="demo", tenant=tenant, priority=3, endpoint="completions", state="finished",
        finish_reason="stop", arrived_at=first - timedelta(seconds=ttft_s), claimed_at=first, first_token_at=first,
        finished_at=NOW - timedelta(seconds=ended_s), prompt_tokens=8, completion_tokens=11, max_tokens=16,
    )  # fmt: skip


def test_percentiles_stand_beside_the_target_that_counts_for_the_tenant() -> None:
    acme = Tenant.objects.create(name="acme")
    ServiceLevel.objects.create(priority=3, ttft_ms=1000, tpot_ms=100, objective_percent=90)
    ServiceLevel.objects.create(tenant=acme, priority=3, ttft_ms=300, tpot_ms=60, objective_percent=99)
    for number in range(10):
        record(number, ended_s=5, ttft_s=0.1 * (number + 1))
        record(100 + number, ended_s=5, tenant="other", tpot_s=0.2 if number == 0 else 0.05)
    rows = ServiceWatch(clock=lambda: NOW).read()["demo"]
    assert rows["acme/3"]["ttft"] == {"p50_s": 0.6, "p99_s": 1.0, "target_s": 0.3}
    assert (rows["acme/3"]["num"], rows["acme/3"]["met"], rows["acme/3"]["objective"]) == (10, 0.3, 0.99)
    assert rows["other/3"]["tpot"] == {"p50_s": 0.05, "p99_s": 0.2, "target_s": 0.1}
    assert rows["other/3"]["met"] == 0.9


@pytest.mark.usefixtures("installation")
def test_the_table_of_the_live_page_is_in_the_api() -> None:
    ServiceLevel.objects.create(priority=3, ttft_ms=1000, objective_percent=90)
    record(1, ended_s=(NOW - timezone.now()).total_seconds() + 5)
    (told,) = get_json(signed_in(), "operator/service", model="demo")
    assert (told["tenant"], told["priority"], told["num"], told["met"]) == ("acme", 3, 1, 1.0)
    assert (told["ttft"]["p99_s"], told["ttft"]["target_s"], told["tpot"]["target_s"]) == (0.2, 1.0, None)
    assert get_json(signed_in(), "operator/service", model="other") == []


def test_a_look_takes_up_what_was_written_since_and_forgets_what_is_older_than_a_minute() -> None:
    now = [NOW]
    watch = ServiceWatch(clock=lambda: now[0])
    record(1, ended_s=50)
    record(2, ended_s=70)
    assert watch.read()["demo"]["acme/3"]["num"] == 1
    record(3, ended_s=5)
    assert watch.read()["demo"]["acme/3"]["num"] == 2
    assert watch.read()["demo"]["acme/3"]["num"] == 2
    now[0] += timedelta(seconds=30)
    rows = watch.read()["demo"]
    assert rows["acme/3"]["num"] == 1
    assert "target_s" not in rows["acme/3"]["ttft"]
    now[0] += timedelta(seconds=60)
    assert watch.read() == {}


def test_refusals_are_counted_once_in_their_windows_also_after_the_store_lost_its_counters() -> None:
    first, second, third = NOW - timedelta(hours=3), NOW - timedelta(hours=2), NOW
    assert add_refusals({"demo|acme|queue_full": 7}, {}, now=first) == 0, "nobody knows when those were"
    assert add_refusals({"demo|acme|queue_full": 9, "a|b|acme|shed": 1}, {}, now=second) == 3
    assert add_refusals({"demo|acme|queue_full": 9, "a|b|acme|shed": 1}, {}, now=second) == 0
    assert add_refusals({"demo|acme|queue_full": 4}, {}, now=third) == 4
    assert read_refusals(NOW - timedelta(hours=1), Resolution.MINUTE) == {"acme": {"queue_full": 4}}
    assert read_refusals(NOW - timedelta(days=1), Resolution.HOUR) == {"acme": {"queue_full": 6, "shed": 1}}


def test_who_is_turned_away_for_want_of_capacity_has_missed_its_service_level() -> None:
    ServiceLevel.objects.create(priority=3, ttft_ms=1000, objective_percent=90)
    add_refusals({}, {}, now=NOW)
    record(1, ended_s=0)
    roll_up(20)
    add_refusals({}, {"demo|acme|3": 4, "demo|acme|5": 2}, now=NOW)
    record(2, ended_s=0)
    roll_up(20)
    for resolution in Resolution.values:
        rows = RequestRollup.objects.filter(resolution=resolution)
        sums = rows.get(priority=3)
        assert (sums.finished, sums.refused, sums.judged, sums.met) == (2, 4, 6, 2)
        assert sums.allowed == pytest.approx(0.6)
        assert rows.filter(priority=5).values_list("refused", "judged").get() == (2, 0), "that has no service level"
