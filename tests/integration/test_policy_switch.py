"""A policy switch is written down, done, acknowledged, and survives what fails on the way."""

import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User
from django.db import connections
from django.utils import timezone

from controlplane.config import Config
from scheduling import services
from scheduling.core.policies import InvalidPolicyParameter, UnknownPolicy, build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.models import OperatorAction, PolicyRevision
from scheduling.selectors import find_weights
from scheduling.store import execute
from scheduling.switch import place_unplaced

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]


@pytest.fixture
def queue(keys: Keys) -> FleetQueue:
    return FleetQueue(keys, "demo")


def fill(store: redis.Redis, queue: FleetQueue, num: int) -> None:
    policy = build_policy("fifo")
    for i in range(num):
        entry = QueueEntry(id=f"r{i}", tenant=f"t{i % 4}", priority=i % 6, arrival_s=i, prompt_tokens=5, max_tokens=5)
        execute(store, queue.enqueue(entry, policy.place(entry), revision=0, body=b"{}", depth_limit=10**6))


def test_a_switch_says_who_when_from_to_why_and_how_it_went(store: redis.Redis, queue: FleetQueue) -> None:
    fill(store, queue, 30)
    actor = User.objects.create_user("olga")

    def announce(revision: PolicyRevision) -> Mapping[str, Any]:
        return {"gpu-0": {"ok": True, "applied_ms": 3.5}}

    revision = services.switch_policy(
        model="demo", name="priority", params={"level_s": 60}, actor=actor, reason="rush hour", announce=announce
    )
    row = PolicyRevision.objects.get(pk=revision.pk)
    assert (row.revision, row.name, row.params, row.state) == (1, "priority", {"level_s": 60}, "applied")
    assert (row.previous_name, row.actor, row.actor_name, row.reason) == ("fifo", actor, "olga", "rush hour")
    assert (row.num_moved, row.acknowledgements) == (30, {"gpu-0": {"ok": True, "applied_ms": 3.5}})
    assert row.seconds is not None
    assert row.applied_at is not None
    active = execute(store, queue.active_policy())
    assert (active.revision, active.name, active.params) == (1, "priority", {"level_s": 60})
    action = OperatorAction.objects.get()
    assert (action.action, action.target, action.actor_name) == ("policy.switch", "demo", "olga")
    assert (action.before["policy"], action.after["policy"], action.reason) == ("fifo", "priority", "rush hour")


@pytest.mark.parametrize(
    ("name", "params", "error"),
    [("lifo", {}, UnknownPolicy), ("fair", {"level_s": -1}, InvalidPolicyParameter)],
)
def test_an_impossible_policy_changes_nothing(name: str, params: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        services.switch_policy(model="demo", name=name, params=params)
    assert not PolicyRevision.objects.exists()
    assert not OperatorAction.objects.exists()


def test_without_redis_a_switch_is_kept_and_applied_later(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    with redis.Redis.from_url("redis://127.0.0.1:1", retry=None) as nowhere:
        revision = services.switch_policy(model="demo", name="fair", client=nowhere, keys=keys)
    assert revision.state == "pending"
    assert revision.error
    assert services.reconcile_policies() == 1
    revision.refresh_from_db()
    assert (revision.state, revision.error) == ("applied", "")
    assert execute(store, queue.active_policy()).name == "fair"
    assert services.reconcile_policies() == 0


def test_only_the_newest_of_several_waiting_switches_is_applied(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    with redis.Redis.from_url("redis://127.0.0.1:1", retry=None) as nowhere:
        for name in ("fair", "priority"):
            services.switch_policy(model="demo", name=name, client=nowhere, keys=keys)
    services.reconcile_policies()
    states = dict(PolicyRevision.objects.values_list("name", "state"))
    assert states == {"fair": "superseded", "priority": "applied"}
    assert execute(store, queue.active_policy()).revision == 2


def test_the_policy_comes_back_after_redis_lost_its_data(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    services.switch_policy(model="demo", name="fair", params={"level_s": 5})
    for key in store.scan_iter(f"*{keys.prefix}*"):
        store.delete(key)
    fill(store, queue, 10)
    assert execute(store, queue.active_policy()).name == "fifo"
    assert services.reconcile_policies() == 1
    active = execute(store, queue.active_policy())
    assert (active.revision, active.name, active.params) == (1, "fair", build_policy("fair", {"level_s": 5}).params)
    assert execute(store, queue.snapshot()).depth == 10


def test_a_switch_whose_process_died_is_ended_by_the_reconciler(store: redis.Redis, queue: FleetQueue) -> None:
    row = PolicyRevision.objects.create(model="demo", revision=1, name="fair", params={"level_s": 30.0})
    assert services.reconcile_policies() == 0, "its own process may still be at it"
    PolicyRevision.objects.update(created_at=timezone.now() - timedelta(minutes=5))
    assert services.reconcile_policies() == 1
    row.refresh_from_db()
    assert row.state == "applied"
    assert execute(store, queue.active_policy()).name == "fair"


def test_a_revision_number_is_never_behind_that_of_redis(store: redis.Redis, queue: FleetQueue) -> None:
    services.switch_policy(model="demo", name="fair")
    services.switch_policy(model="demo", name="fifo")
    PolicyRevision.objects.all().delete()  # the database came back from a backup
    assert services.switch_policy(model="demo", name="priority").revision == 3


def test_workers_that_cannot_be_told_do_not_undo_a_switch(store: redis.Redis, queue: FleetQueue) -> None:
    def announce(revision: PolicyRevision) -> Mapping[str, Any]:
        raise OSError("no broker")

    revision = services.switch_policy(model="demo", name="fair", announce=announce)
    assert revision.state == "applied"
    assert execute(store, queue.active_policy()).name == "fair"


def test_operators_who_switch_at_once_follow_each_other(
    store: redis.Redis, queue: FleetQueue, installation: Config
) -> None:
    fill(store, queue, 200)
    start = threading.Barrier(6)

    def switch(name: str) -> None:
        try:
            start.wait(10)
            services.switch_policy(model="demo", name=name)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=switch, args=(name,)) for name in ("fair", "priority", "fifo") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    rows = list(PolicyRevision.objects.order_by("revision"))
    assert [row.revision for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1].state == "applied"
    assert {row.state for row in rows} <= {"applied", "superseded"}
    active = execute(store, queue.active_policy())
    assert (active.revision, active.name) == (6, rows[-1].name)
    assert execute(store, queue.snapshot()).depth == 200


@pytest.mark.parametrize(
    ("policy", "params"),
    [("fair", {}), ("hierarchical", {}), ("adaptive", {"current": "fair"})],
    ids=lambda one: str(one),
)
def test_a_changed_weight_reaches_what_waits(
    store: redis.Redis, keys: Keys, queue: FleetQueue, policy: str, params: dict[str, Any]
) -> None:
    tenant = services.create_tenant(name="t3")
    store.hset(keys.deployments, "demo", "{}")
    fill(store, queue, 8)
    services.switch_policy(model="demo", name=policy, params=params)
    services.update_tenant(tenant=tenant, weight=7.5, reason="bought more")
    claimed = execute(store, queue.claim("gpu-0:1", max_requests=5, max_tokens=10**6, lease_s=5))
    assert {"r3", "r7"} <= {request.id for request in claimed.requests}, "twice in five, though last among equals"


def test_a_weight_that_changed_since_a_request_came_holds_after_a_switch_and_where_it_is_placed_again(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    tenant = services.create_tenant(name="t3")
    store.hset(keys.deployments, "demo", "{}")
    fill(store, queue, 8)
    running = execute(store, queue.claim("gpu-0:1", max_requests=4, max_tokens=10**6, lease_s=5))
    services.update_tenant(tenant=tenant, weight=7.5, reason="bought more")
    services.switch_policy(model="demo", name="fair")
    assert weight_of(store, queue, "t3") == 7.5
    services.switch_policy(model="demo", name="fair", params={"level_s": 7})
    assert weight_of(store, queue, "t3") == 7.5
    assert "r3" in {request.id for request in running.requests}
    execute(store, queue.release("gpu-0:1"))
    services.update_tenant(tenant=tenant, weight=5.0)
    assert place_unplaced(store, queue) == 4, "by the weights that they came with: others of their flows know better"
    assert weight_of(store, queue, "t3") == 5.0


def test_what_waits_alone_and_unplaced_has_the_weight_of_now(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    services.create_tenant(name="t3", weight=7.5)
    fill(store, queue, 4)
    execute(store, queue.claim("gpu-0:1", max_requests=4, max_tokens=10**6, lease_s=5))
    services.switch_policy(model="demo", name="fair")
    execute(store, queue.release("gpu-0:1"))
    assert place_unplaced(store, queue, find_weights) == 4
    assert (weight_of(store, queue, "t2"), weight_of(store, queue, "t3")) == (1.0, 7.5)


def weight_of(store: redis.Redis, queue: FleetQueue, tenant: str) -> float:
    epoch = store.hget(f"{queue.base}:meta", "epoch")
    assert epoch is not None
    return float(store.hget(f"{queue.base}:meta", f"w:{epoch.decode()}:{tenant}") or 0)  # type: ignore[union-attr]
