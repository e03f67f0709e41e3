"""Before and after a switch: recorded traffic replayed for the operator, and a bad policy turned back by itself."""

import re
from datetime import timedelta
from importlib import import_module
from itertools import count
from typing import Any

import pytest
import redis
from django.apps import apps
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import DatabaseError
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

from controlplane.config import Config
from dashboard import guard, overdue, what_if
from dashboard.guard import Guard, check_guards, switch_under_guard
from dashboard.models import GuardedSwitch, WhatIfRun
from dashboard.what_if import WhatIfError, ask_what_if
from inference.models import ModelDeployment, RequestRecord
from scheduling.core.policies import build_policy
from scheduling.keys import Keys
from scheduling.models import OperatorAction, PolicyRevision, ServiceLevel
from scheduling.policy_switch import reconcile_policies
from scheduling.store import execute
from scheduling.switch import switch_policy as switch_queue
from tests.fleet_data import FleetWriter
from tests.history_data import make_requests
from tests.integration.recorded_run import START, record_run
from tests.integration.test_dashboard_pages import get_json, signed_in
from tests.integration.test_what_if import COST, overload

pytestmark = pytest.mark.django_db
HOUR = timedelta(hours=1)
SEEDS = count(2)
GUARD = {"guard.metric": "ttft_p99_s", "guard.threshold": "60", "guard.watch_s": "120"}


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    return writer


def switch_guarded(client: Client, **changes: str) -> Any:
    form = {"policy": "priority", "reason": "try it", **GUARD, **changes}
    return client.post("/queues/demo/policy/", form)


def served(num: int, *, late_s: float = 0.0) -> None:
    """Requests that ended just now, with first tokens late by this much."""
    rows = list(make_requests(num, end=timezone.now(), seconds=0.5, seed=next(SEEDS)))
    for row in rows:
        row.state = "finished"
        row.arrived_at -= timedelta(seconds=late_s)
        row.first_token_at = row.first_token_at or row.finished_at
    RequestRecord.objects.bulk_create(rows)


def let_pass(seconds: float) -> None:
    """As if the switch had been so long ago."""
    for watched in GuardedSwitch.objects.all():
        watched.started_at -= timedelta(seconds=seconds)
        watched.save()


def test_a_bad_policy_under_load_is_turned_back_by_itself_and_nothing_is_lost(fleet: FleetWriter) -> None:
    RequestRecord.objects.bulk_create(make_requests(60, end=timezone.now() - timedelta(seconds=5), seconds=60))
    ids = {fleet.enqueue(f"tenant-{i % 4}", i % 6) for i in range(150)}
    claimed = {request.id for request in fleet.claim(20)}
    assert switch_guarded(signed_in("operator")).status_code == 200
    let_pass(200)
    assert check_guards() == 0
    served(40, late_s=90)
    assert check_guards() == 1
    active = execute(fleet.client, fleet.queue.active_policy())
    assert (active.name, active.revision) == ("fifo", 2)
    claimed |= {request.id for request in fleet.claim(200)}
    assert claimed == ids
    watched = GuardedSwitch.objects.get()
    assert (watched.state, watched.rolled_back_to) == ("rolled back", 2)
    assert watched.before["ttft_p99_s"] < 60 < watched.after["ttft_p99_s"]
    back = PolicyRevision.objects.get(revision=2)
    assert back.actor_name == "guard"
    assert "above the guard's 60 s" in back.reason
    assert OperatorAction.objects.filter(actor_name="guard").count() == 1
    assert check_guards() == 0
    page = signed_in().get("/policies/").content.decode()
    assert "rolled back" in page
    assert "TTFT, p99 not above 60 s, watched 120 s" in page
    assert re.search(
        r"<td>TTFT, p99</td>\s*<td class=\"num\">[\d.]+ m?s</td>\s*<td class=\"num\">1 min \d+ s</td>", page
    )
    assert "ttft_p99_s" not in re.sub(r"(?s)<select.*?</select>", "", page)
    (told,) = get_json(signed_in(), "operator/guards", model="demo")
    assert told["verdict"] == watched.verdict
    assert get_json(signed_in(), "operator/guards", model="demo", before=told["revision"]) == []


def test_a_good_policy_is_kept_and_what_is_superseded_is_left_alone(fleet: FleetWriter) -> None:
    operator = signed_in("operator")
    switch_guarded(operator)
    let_pass(200)
    served(10, late_s=90)
    assert check_guards() == 0, "ten requests are too few to judge"
    assert GuardedSwitch.objects.get().after["requests"] == 10
    RequestRecord.objects.all().delete()
    served(40)
    later = timezone.now() + timedelta(seconds=121)
    assert check_guards(clock=lambda: later) == 0
    assert GuardedSwitch.objects.get().state == "kept"
    switch_guarded(operator, policy="fair")
    assert operator.post("/queues/demo/policy/", {"policy": "fifo", "reason": "by hand"}).status_code == 200
    served(40, late_s=90)
    assert check_guards() == 0
    assert GuardedSwitch.objects.get(revision=2).state == "superseded"
    assert execute(fleet.client, fleet.queue.active_policy()).revision == 3


def test_who_waited_under_the_former_policy_is_not_held_against_the_new_one(fleet: FleetWriter) -> None:
    fleet.enqueue("chat", age_s=300)
    switch_guarded(signed_in("operator"))
    switch_guarded(signed_in("operator"), policy="fair", **{"guard.metric": "oldest_wait_s"})
    let_pass(1)
    served(40, late_s=90)
    assert check_guards() == 0
    assert GuardedSwitch.objects.get(revision=2).after["requests"] == 0
    assert GuardedSwitch.objects.get(revision=2).after["oldest_wait_s"] < 30


@pytest.mark.parametrize(
    ("metric", "threshold", "waiting", "turned_back"),
    [
        ("attainment", "80", 20, 1),
        ("ttft_p99_s", "60", 20, 1),
        ("queue_p99_s", "60", 20, 1),
        ("e2e_p99_s", "95", 20, 0),
        ("ttft_p99_s", "60", 0, 0),
        ("failed", "50", 20, 0),
    ],
)
def test_who_starves_is_judged_beside_those_who_are_served(
    fleet: FleetWriter, metric: str, threshold: str, waiting: int, turned_back: int
) -> None:
    for priority in range(6):
        ServiceLevel.objects.create(priority=priority, ttft_ms=80_000)
    switch_guarded(signed_in("operator"), **{"guard.metric": metric, "guard.threshold": threshold})
    let_pass(200)
    served(30)
    for _ in range(waiting):
        fleet.enqueue("chat", age_s=90)
    assert check_guards() == turned_back
    assert GuardedSwitch.objects.get().after["waiting"] == waiting


@pytest.mark.parametrize(("metric", "threshold"), [("attainment", "50"), ("queue_p99_s", "60")])
def test_of_many_that_starve_each_that_is_looked_at_stands_for_as_many(
    fleet: FleetWriter, monkeypatch: pytest.MonkeyPatch, metric: str, threshold: str
) -> None:
    monkeypatch.setattr(overdue, "MAX_WAITS", 1 if metric == "queue_p99_s" else 10)
    for priority in range(6):
        ServiceLevel.objects.create(priority=priority, ttft_ms=80_000)
    switch_guarded(signed_in("operator"), **{"guard.metric": metric, "guard.threshold": threshold})
    let_pass(200)
    served(200 if metric == "queue_p99_s" else 40)
    for _ in range(100):
        fleet.enqueue("chat", age_s=90)
    assert check_guards() == 1, "most wait, though few of them were looked at"
    assert GuardedSwitch.objects.get().after["waiting"] == 100


def test_an_operators_switch_in_the_moment_of_a_breach_stands(
    fleet: FleetWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = signed_in("operator")
    switch_guarded(operator)
    let_pass(200)
    served(40, late_s=90)
    look = guard.find_breach

    def slow(*args: Any) -> str:
        assert operator.post("/queues/demo/policy/", {"policy": "fair", "reason": "by hand"}).status_code == 200
        return look(*args)

    monkeypatch.setattr(guard, "find_breach", slow)
    assert check_guards() == 0
    assert execute(fleet.client, fleet.queue.active_policy()).name == "fair"
    assert GuardedSwitch.objects.get().state == "superseded"


@pytest.mark.parametrize(
    ("metric", "threshold", "turned_back"),
    [("attainment", "50", 1), ("failed", "50", 0), ("oldest_wait_s", "100", 1), ("oldest_wait_s", "1000", 0)],
)
def test_a_guard_watches_the_figure_that_was_chosen(
    fleet: FleetWriter, metric: str, threshold: str, turned_back: int
) -> None:
    for priority in range(6):
        ServiceLevel.objects.create(priority=priority, ttft_ms=1)
    fleet.enqueue("chat", age_s=300)
    switch_guarded(signed_in("operator"), **{"guard.metric": metric, "guard.threshold": threshold})
    let_pass(200)
    served(30)
    assert check_guards() == turned_back


def test_a_watch_begins_when_the_policy_comes_into_force(fleet: FleetWriter) -> None:
    switch_guarded(signed_in("operator"))
    PolicyRevision.objects.update(state="pending", applied_at=None)
    let_pass(200)
    later = timezone.now() + timedelta(seconds=500)
    assert check_guards(clock=lambda: later) == 0
    watched = GuardedSwitch.objects.get()
    assert (watched.state, watched.started_at, watched.ends_at) == ("watching", later, later + timedelta(seconds=120))


def test_a_guard_follows_its_revision_where_redis_is_ahead_of_a_restored_database(
    fleet: FleetWriter, settings: Settings
) -> None:
    values = settings.PENSTOCK.model_dump()
    settings.PENSTOCK = Config.model_construct(**values | {"redis_url": "unix:///nowhere/redis.sock"})
    wanted = Guard(metric="ttft_p99_s", threshold=60, watch_s=120)
    revision, _ = switch_under_guard(wanted, model="demo", name="priority", reason="try it")
    assert (revision.revision, revision.state) == (1, "pending")
    settings.PENSTOCK = Config.model_construct(**values)
    switch_queue(fleet.client, fleet.queue, build_policy("fair", {}), 7)
    assert reconcile_policies() == 1
    assert check_guards() == 0
    let_pass(200)
    served(40, late_s=90)
    assert check_guards() == 1
    watched = GuardedSwitch.objects.get()
    assert (watched.state, watched.revision, watched.rolled_back_to) == ("rolled back", 8, 9)


def test_a_guard_that_watches_while_the_system_is_updated_goes_on(fleet: FleetWriter) -> None:
    switch_guarded(signed_in("operator"))
    GuardedSwitch.objects.update(row=None)
    import_module("dashboard.migrations.0007_guarded_revision").find_rows(apps, None)
    assert check_guards() == 0
    watched = GuardedSwitch.objects.get()
    assert (watched.state, watched.row) == ("watching", PolicyRevision.objects.get())


def test_a_former_policy_that_is_no_more_is_said_and_stops_no_other_guard(fleet: FleetWriter) -> None:
    switch_guarded(signed_in("operator"))
    PolicyRevision.objects.update(previous_name="gone")
    let_pass(200)
    served(40, late_s=90)
    assert check_guards() == 0
    watched = GuardedSwitch.objects.get()
    assert (watched.state, "cannot be brought back" in watched.verdict) == ("kept", True)


def test_a_switch_whose_guard_cannot_be_written_is_not_made(
    fleet: FleetWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise DatabaseError

    monkeypatch.setattr(guard, "read_figures", fail)
    assert switch_guarded(signed_in("operator")).status_code == 503
    assert not PolicyRevision.objects.exists()
    assert execute(fleet.client, fleet.queue.active_policy()).revision == 0


def test_a_share_of_few_judged_requests_turns_nothing_back_and_the_verdict_says_so(fleet: FleetWriter) -> None:
    ServiceLevel.objects.create(priority=5, ttft_ms=1)
    switch_guarded(signed_in("operator"), **{"guard.metric": "attainment", "guard.threshold": "99"})
    let_pass(200)
    served(30)
    rows = list(RequestRecord.objects.values_list("pk", flat=True))
    RequestRecord.objects.update(priority=0)
    RequestRecord.objects.filter(pk=rows[0]).update(priority=5)
    later = timezone.now() + timedelta(seconds=121)
    assert check_guards(clock=lambda: later) == 0
    watched = GuardedSwitch.objects.get()
    assert (watched.after["judged"], watched.after["attainment"]) == (1, 0)
    assert watched.state == "kept"
    assert "was not judged" in watched.verdict


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"guard.metric": "beauty"}, "guard.metric"),
        ({"guard.threshold": "nan"}, "guard.threshold"),
        ({"guard.threshold": ""}, "guard.threshold"),
        ({"guard.watch_s": "1"}, "guard.watch_s"),
        ({"guard.watch_s": "7.5"}, "guard.watch_s"),
    ],
)
def test_a_guard_that_cannot_be_stops_the_switch(fleet: FleetWriter, change: dict[str, str], field: str) -> None:
    answer = switch_guarded(signed_in("operator"), **change)
    assert (answer.status_code, list(answer.json()["fields"])) == (400, [field])
    assert not PolicyRevision.objects.exists()


def test_a_guarded_switch_by_the_api_is_for_operators(fleet: FleetWriter) -> None:
    wanted = {"metric": "e2e_p99_s", "threshold": 9, "watch_s": 60}
    body = {"model": "demo", "name": "fair", "reason": "by script", "guard": wanted}

    def post(client: Client, **changes: Any) -> Any:
        return client.post("/api/v1/operator/guarded-switch", body | changes, content_type="application/json")

    assert post(signed_in()).status_code == 403
    operator = signed_in("operator")
    assert post(operator, guard=wanted | {"metric": "beauty"}).status_code == 400
    assert post(operator, model="nothing").status_code == 404
    assert post(operator).json()["state"] == "watching"
    assert execute(fleet.client, fleet.queue.active_policy()).name == "fair"


def ask(**changes: Any) -> WhatIfRun:
    olga, _ = User.objects.get_or_create(username="olga")
    values: dict[str, Any] = {"model": "demo", "start": START, "end": START + HOUR, "actor": olga}
    return ask_what_if(**(values | {"candidates": [{"policy": "fair"}]} | changes))


def test_recorded_traffic_is_replayed_and_stands_beside_what_happened(fleet: FleetWriter) -> None:
    ModelDeployment.objects.create(name="demo", path="/models/demo", max_batch_size=8, step_tokens=256)
    record_run(overload(20), COST)
    run = ask(candidates=[{"policy": "fifo"}, {"policy": "fair", "params": {"level_s": 10}}])
    with pytest.raises(WhatIfError, match="under way"):
        ask()
    call_command("run_what_if", str(run.pk))
    run.refresh_from_db()
    assert (run.state, run.progress, run.error) == ("done", 1.0, "")
    page = signed_in().get("/policies/").content.decode()
    assert "really happened" in page
    assert ">light</th>" in page.replace("\n", "").replace(" ", "")
    told = get_json(signed_in(), f"operator/what-if/{run.pk}")
    assert [one["policy"] for one in told["result"]["candidates"]] == ["fifo", "fair"]
    light = [one["tenants"]["light"]["ttft_s"]["mean"] for one in told["result"]["candidates"]]
    assert light[1] < light[0] / 2
    assert get_json(signed_in(), "operator/what-if", model="demo")[0]["result"] is None
    assert get_json(signed_in(), "operator/what-if", model="demo", before=run.pk) == []
    asked = OperatorAction.objects.get(action="what_if.ask")
    assert (asked.actor_name, asked.target, asked.after["candidates"][0]["policy"]) == ("olga", "demo", "fifo")


def test_a_replay_that_cannot_be_says_why(fleet: FleetWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    for candidates in ([], [{"policy": "fair"}] * 9):
        with pytest.raises(WhatIfError, match="Choose one to 8"):
            ask(candidates=candidates)
    with pytest.raises(WhatIfError, match="at most 6 hours"):
        ask(end=START + 7 * HOUR)
    run = ask()
    what_if.replay(run.pk)
    run.refresh_from_db()
    assert (run.state, "No request of 'demo' is recorded" in run.error) == ("failed", True)
    lost = ask()
    WhatIfRun.objects.filter(pk=lost.pk).update(state="running", updated_at=timezone.now() - HOUR)
    assert ask().pk > lost.pk
    lost.refresh_from_db()
    assert (lost.state, "interrupted" in lost.error) == ("failed", True)
    assert signed_in().post("/queues/demo/what-if/", {"candidate": "fair"}).status_code == 403
