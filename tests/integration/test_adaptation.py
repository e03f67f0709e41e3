"""The adaptive policy in force: it switches by itself, says why, and gives way to an operator."""

import time

import pytest
import redis

from inference import tasks
from scheduling.adaptation import ACTOR, Adaptation
from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.models import OperatorAction, PolicyRevision
from scheduling.policy_switch import switch_policy
from scheduling.store import execute, execute_many
from scheduling.switch import StaleRevision
from tests.patience import wait_until

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]


class Clock:
    """Unix time, moved by the test."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def adaptation(store: redis.Redis, keys: Keys, clock: Clock) -> Adaptation:
    return Adaptation(store, keys, clock)


def crowd(store: redis.Redis, keys: Keys, num: int = 40) -> FleetQueue:
    """Nearly all that waits is one tenant's."""
    queue = FleetQueue(keys, "demo")
    active = execute(store, queue.active_policy())
    policy = build_policy(active.name, active.params)
    entries = [
        QueueEntry(
            id=f"r{i}",
            tenant="light" if i % 10 == 0 else ("calm" if i % 10 == 1 else "heavy"),
            priority=3,
            arrival_s=time.time(),
            prompt_tokens=50,
            max_tokens=50,
            deadline_s=time.time() + 1e6,
        )
        for i in range(num)
    ]
    commands = [
        queue.enqueue(entry, policy.place(entry), revision=active.revision, body=b"", depth_limit=10**6)
        for entry in entries
    ]
    execute_many(store, commands)
    return queue


def test_a_tenant_that_crowds_out_others_brings_fair_into_force_with_its_reason(
    store: redis.Redis, keys: Keys, clock: Clock, adaptation: Adaptation
) -> None:
    switch_policy(model="demo", name="adaptive", reason="let it choose")
    queue = crowd(store, keys)
    for _ in range(5):
        assert adaptation.run_once() == 0, "not within the dwell"
        clock.now += 10
    clock.now += 20
    assert adaptation.run_once() == 1
    active = execute(store, queue.active_policy())
    assert (active.revision, active.name, active.params["current"]) == (2, "adaptive", "fair")
    row = PolicyRevision.objects.get(revision=2)
    assert (row.actor, row.actor_name, row.state, row.num_moved) == (None, ACTOR, "applied", 40)
    assert "one tenant has 8.0 times the mean of the others" in row.reason
    assert OperatorAction.objects.get(reason=row.reason).actor_name == ACTOR
    claimed = execute(store, queue.claim("gpu", max_requests=9, max_tokens=10**6, lease_s=60))
    assert sum(request.id[-1] in "01" for request in claimed.requests) == 6, "now served by tenant"
    clock.now += 1
    assert adaptation.run_once() == 0


def test_a_new_ops_process_keeps_the_dwell(
    store: redis.Redis, keys: Keys, clock: Clock, adaptation: Adaptation
) -> None:
    switch_policy(model="demo", name="adaptive")
    crowd(store, keys)
    clock.now += 30
    for _ in range(3):
        assert Adaptation(store, keys, clock).run_once() == 0


def test_other_policies_are_left_alone(store: redis.Redis, keys: Keys, clock: Clock, adaptation: Adaptation) -> None:
    switch_policy(model="demo", name="fifo")
    crowd(store, keys)
    for _ in range(5):
        clock.now += 60
        assert adaptation.run_once() == 0


def test_an_operator_who_switches_first_wins(store: redis.Redis, keys: Keys) -> None:
    switch_policy(model="demo", name="adaptive")
    switch_policy(model="demo", name="priority", reason="I know better")
    with pytest.raises(StaleRevision, match="Revision 2 of demo came first"):
        switch_policy(model="demo", name="adaptive", params={"current": "fair"}, actor_name=ACTOR, after=1)
    assert execute(store, FleetQueue(keys, "demo").active_policy()).name == "priority"
    assert PolicyRevision.objects.count() == 2


def test_the_periodic_task_adapts(store: redis.Redis, keys: Keys) -> None:
    switch_policy(model="demo", name="adaptive", params={"dwell_s": 1, "hold_s": 0})
    queue = crowd(store, keys)

    def has_switched() -> bool:
        tasks.adapt_policies()
        return execute(store, queue.active_policy()).revision != 1

    wait_until(has_switched)
    assert execute(store, queue.active_policy()).params["current"] == "fair"
