"""Alerts from a reading to a row: pending, fired, resolved, bounded, one for each subject, over outages."""

import json
from datetime import datetime, timedelta
from importlib import import_module
from typing import Any

import msgspec
import pytest
import redis
from django.apps import apps
from pytest_django.fixtures import Settings

from controlplane.config import Config
from dashboard.alerts.models import Alert, AlertRule, Notice
from dashboard.alerts.reader import read_all
from dashboard.alerts.services import prune_alerts
from dashboard.alerts.watch import MAX_OPEN, watch_alerts
from dashboard.refusals import add_refusals
from dashboard.rollups import roll_up
from inference.messages import DeploymentSpec, Telemetry
from inference.models import BatchRecord, Replica, RequestRecord
from scheduling.keys import Keys
from scheduling.models import ServiceLevel
from tests.fleet_data import FleetWriter
from tests.history_data import make_batches, make_requests
from tests.integration.alerting import SteppedClock, fill, fire, make_rule, watch

pytestmark = pytest.mark.django_db


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    AlertRule.objects.all().delete()
    return writer


def test_a_long_queue_is_pending_then_fires_once_and_resolves_when_it_was_short_for_a_while(
    fleet: FleetWriter, clock: SteppedClock, store: redis.Redis, keys: Keys
) -> None:
    make_rule()
    fill(fleet)
    assert watch(clock) == 0
    assert (Alert.objects.get().state, Notice.objects.count()) == ("pending", 0)
    clock.tick(20)
    assert watch(clock) == 1
    clock.tick(5)
    assert watch(clock) == 0
    alert = Alert.objects.get()
    assert (alert.state, alert.value, alert.fired_at) == ("firing", 5, clock.now - timedelta(seconds=5))
    assert "no ready worker" in alert.reason
    assert json.loads(store.get(keys.alerts) or b"") == [["Long queue", "warning", 1]]
    for request in fleet.claim(5):
        fleet.finish(request)
    assert watch(clock) == 0
    clock.tick(10)
    assert watch(clock) == 1
    alert.refresh_from_db()
    assert (alert.state, alert.ending) == ("resolved", "Back to 0 requests, within the threshold of 3.")
    assert list(Notice.objects.order_by("created_at").values_list("event", flat=True)) == ["firing", "resolved"]
    assert json.loads(store.get(keys.alerts) or b"") == [["Long queue", "warning", 0]]


def test_what_never_held_leaves_no_trace(fleet: FleetWriter, clock: SteppedClock) -> None:
    make_rule(threshold=4)
    fill(fleet)
    watch(clock)
    fleet.claim(3)
    clock.tick(5)
    assert watch(clock) == 0
    assert not Alert.objects.exists()


def test_two_looks_at_once_make_one_alert(fleet: FleetWriter, clock: SteppedClock) -> None:
    make_rule(hold_s=0)
    fill(fleet)

    def read_slowly(rules: Any, now: datetime) -> Any:
        readings = read_all(rules, now)
        watch_alerts(clock=clock)  # another process was faster
        return readings

    watch_alerts(read_slowly, clock)
    assert (Alert.objects.count(), Notice.objects.count()) == (1, 1)


def test_while_redis_is_away_an_alert_about_its_queue_stands(
    fleet: FleetWriter, clock: SteppedClock, settings: Settings
) -> None:
    alert = fire(fleet, clock)
    values = settings.PENSTOCK.model_dump() | {"redis_url": "unix:///nowhere/redis.sock"}
    settings.PENSTOCK = Config.model_construct(**values)
    clock.tick(500)
    assert watch(clock) == 0
    alert.refresh_from_db()
    assert (alert.state, alert.clear_at) == ("firing", None)


@pytest.mark.parametrize(("end", "said"), [("off", "switched off"), ("delete", "deleted")])
def test_a_rule_that_is_switched_off_or_deleted_resolves_what_it_fired(
    fleet: FleetWriter, clock: SteppedClock, end: str, said: str
) -> None:
    alert = fire(fleet, clock)
    rule = AlertRule.objects.get()
    if end == "off":
        rule.enabled = False
        rule.save()
    else:
        rule.delete()
    assert watch(clock) == 1
    alert.refresh_from_db()
    assert alert.state == "resolved"
    assert said in alert.ending
    assert alert.rule_name == "Long queue"


def test_a_rule_of_one_model_takes_the_place_of_the_rule_of_all(fleet: FleetWriter, clock: SteppedClock) -> None:
    other = FleetWriter(fleet.client, fleet.keys, model="other")
    other.deploy()
    fill(fleet)
    fill(other)
    make_rule(hold_s=0)
    make_rule(name="Longer queue", model="demo", threshold=50, hold_s=0)
    make_rule(name="Grave queue", threshold=4, severity="critical", hold_s=0)
    watch(clock)
    found = sorted(Alert.objects.values_list("rule_name", "model"))
    assert found == [("Grave queue", "demo"), ("Grave queue", "other"), ("Long queue", "other")]


def test_alerts_of_one_rule_are_bounded_and_the_worst_come_first(
    fleet: FleetWriter, clock: SteppedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashboard.alerts.watch.MAX_OPEN", 2)
    assert MAX_OPEN > 2
    for num, name in ((4, "a"), (9, "b"), (6, "c")):
        writer = FleetWriter(fleet.client, fleet.keys, model=name)
        writer.deploy()
        fill(writer, num)
    make_rule(hold_s=0)
    for _ in range(2):
        watch(clock)
    assert sorted(Alert.objects.values_list("model", flat=True)) == ["b", "c"]


def test_every_default_rule_can_be_used_and_judges_what_was_recorded(fleet: FleetWriter, clock: SteppedClock) -> None:
    migration = import_module("dashboard.migrations.0005_default_alert_rules")
    for _ in range(2):
        migration.create_rules(apps, None)
    rules = list(AlertRule.objects.all())
    assert len(rules) == 9
    for rule in rules:
        rule.full_clean()
    now = clock()
    ServiceLevel.objects.create(priority=0, ttft_ms=1)
    rows = list(make_requests(400, end=now, seconds=250, tenants=("acme",)))
    for i, row in enumerate(rows):
        row.priority = 0
        if i % 4 == 0:
            row.state = "failed"
    RequestRecord.objects.bulk_create(rows)
    seconds = list(make_batches(430, end=now + timedelta(seconds=130), replicas=1))
    for second in seconds:
        second.max_batch_size, second.batch_size_mean, second.step_ms_mean = 16, 4, 300.0
        second.throttle_reasons = ["thermal"]
    BatchRecord.objects.bulk_create(seconds)
    roll_up(60)
    fill(fleet, 105)
    hung = Telemetry(source="nvml", device="H100", stale_s=99.0, throttle_reasons=["thermal"])
    fleet.publish(fleet.status(telemetry=hung))
    for _ in range(13):
        fleet.publish(fleet.status(telemetry=hung))
        watch(clock)
        clock.tick(10)
    fired = dict(Alert.objects.filter(state="firing").values_list("rule_name", "subject"))
    assert fired == {
        "Batches run half empty": "",
        "Long queue": "",
        "Slow steps": "",
        "Requests fail": "",
        "SLA budget burns fast": "acme",
        "SLA budget burns": "acme",
        "SLA budget leaks": "acme",
        "No telemetry": "gpu-0",
        "Device throttled": "gpu-0",
    }


def test_a_power_cap_is_no_throttling_and_a_worker_that_fell_silent_is_told_until_it_is_forgotten(
    fleet: FleetWriter, clock: SteppedClock
) -> None:
    make_rule(name="Throttled", kind="throttling", threshold=20, window_s=60, hold_s=0)
    make_rule(name="Silent", kind="telemetry", threshold=30, hold_s=0, clear_s=0)
    rows = list(make_batches(30, end=clock(), replicas=1))
    for row in rows:
        row.throttle_reasons = ["power cap"]
    BatchRecord.objects.bulk_create(rows)
    Replica.objects.create(name="gpu-7", model="demo", state="lost", last_seen_at=clock() - timedelta(minutes=2))
    Replica.objects.create(name="gpu-8", model="demo", state="stopped", last_seen_at=clock() - timedelta(minutes=2))
    watch(clock)
    assert Alert.objects.get().subject == "gpu-7"
    assert "The worker fell silent" in Alert.objects.get().reason
    clock.tick(3600)
    watch(clock)
    assert Alert.objects.get().state == "resolved"


def test_a_worker_that_forwards_to_another_server_owes_no_telemetry(fleet: FleetWriter, clock: SteppedClock) -> None:
    make_rule(name="Silent", kind="telemetry", threshold=30, hold_s=0)
    status = msgspec.structs.replace(fleet.status(), telemetry=None, started_s=clock.now.timestamp() - 99)
    fleet.publish(status)
    spec = DeploymentSpec(name="demo", path="", backend="openai", upstream_url="http://127.0.0.1:1/v1")
    fleet.client.hset(fleet.keys.deployments, "demo", msgspec.json.encode(spec))
    assert watch(clock) == 0
    fleet.deploy()
    assert watch(clock) == 1
    assert "told nothing of its device" in Alert.objects.get().reason


def test_old_alerts_go_with_their_notices_and_open_ones_stay(fleet: FleetWriter, clock: SteppedClock) -> None:
    alert = fire(fleet, clock)
    clock.tick(86_400 * 10)
    assert prune_alerts(days=5, now=clock()) == 0
    AlertRule.objects.all().delete()
    watch(clock)
    clock.tick(86_400 * 10)
    assert prune_alerts(days=5, now=clock()) == 1
    assert not Notice.objects.filter(alert_id=alert.pk).exists()


def test_an_outage_in_which_nothing_waits_is_told(fleet: FleetWriter, clock: SteppedClock) -> None:
    make_rule(name="No worker serves", kind="ready_workers", threshold=1, hold_s=0)
    make_rule(name="Requests are refused", kind="refusals", threshold=5, window_s=600, hold_s=0)
    make_rule(name="Burn", kind="sla_burn", threshold=6, window_s=3600, short_window_s=300, hold_s=0)
    ServiceLevel.objects.create(priority=3, ttft_ms=1000)
    add_refusals({}, {}, now=clock.now)
    add_refusals({}, {"demo|acme|3": 25}, now=clock.now)
    assert watch(clock) == 3
    reasons = {alert.rule_name: alert.reason for alert in Alert.objects.all()}
    assert "no ready workers" in reasons["No worker serves"]
    assert "25 of 25 requests" in reasons["Requests are refused"]
    assert "acme missed its SLA with 25 of 25" in reasons["Burn"]


def test_requests_that_wait_past_their_target_burn_the_budget_before_they_end(
    fleet: FleetWriter, clock: SteppedClock
) -> None:
    make_rule(kind="sla_burn", threshold=6, window_s=3600, short_window_s=300, hold_s=0)
    ServiceLevel.objects.create(priority=3, ttft_ms=100_000)
    for i in range(30):
        fleet.enqueue("starving", age_s=200 if i < 25 else 1)
    assert watch(clock) == 1
    alert = Alert.objects.get()
    assert (alert.subject, "25 of 25 requests" in alert.reason) == ("starving", True)


def test_an_installation_begins_with_rules_for_an_outage() -> None:
    rules = AlertRule.objects.filter(kind__in=("ready_workers", "refusals"), enabled=True, severity="critical")
    assert rules.count() == 2
    for rule in rules:
        rule.full_clean()
