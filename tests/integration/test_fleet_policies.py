"""Every policy in the Redis queue: the order, the prices and the promotion of the queue in memory."""

import time
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import redis

from scheduling.core.policies import POLICIES, Policy, build_policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.store import execute, execute_many
from scheduling.switch import switch_policy


def some_entry(number: int, rng: Random, now: float) -> QueueEntry:
    return QueueEntry(
        id=f"r{number:05d}",
        tenant=f"t{rng.randrange(5)}",
        priority=rng.randrange(6),
        arrival_s=now + rng.randrange(-100, 100) / 4,
        prompt_tokens=rng.randrange(1, 3000),
        max_tokens=rng.randrange(1, 500),
        deadline_s=now + rng.randrange(-50, 400) / 4 if rng.random() < 0.5 else None,
        share=rng.choice([0.5, 1.0, 3.0]),
    )


class Both:
    """The two queues, told the same."""

    def __init__(self, store: redis.Redis, keys: Keys, policy: Policy) -> None:
        self.store, self.fleet, self.memory = store, FleetQueue(keys, "demo"), FlowQueue(clock=lambda: 0.0)
        self.policy, self.revision = policy, 1
        assert execute(store, self.fleet.init_policy(policy.name, policy.params, 1))
        assert self.memory.init_policy(policy.name, policy.params, 1)

    def put(self, *entries: QueueEntry) -> None:
        commands = []
        for entry in entries:
            place = self.policy.place(entry)
            answer = self.memory.enqueue(entry, place, revision=self.revision, depth_limit=10**6)
            assert answer.status == "queued"
            commands.append(
                self.fleet.enqueue(entry, place, revision=self.revision, body=b"", depth_limit=10**6, keep_s=60)
            )
        execute_many(self.store, commands)

    def claim(self, num: int, now: float) -> list[str]:
        answer = execute(self.store, self.fleet.claim("gpu", max_requests=num, max_tokens=10**9, lease_s=1e9, now=now))
        same = self.memory.claim("gpu", max_requests=num, max_tokens=10**9, lease_s=1e9, now=now)
        assert [r.id for r in answer.requests] == [r.id for r in same.requests]
        assert (answer.depth, answer.more) == (same.depth, same.more)
        return [request.id for request in answer.requests]

    def finish(self, id_: str, used_tokens: int) -> None:
        end: dict[str, Any] = {"state": "finished", "used_tokens": used_tokens, "finish": b"", "output": ""}
        assert execute(self.store, self.fleet.finish("gpu", id_, 1, **end))
        assert self.memory.finish("gpu", id_, 1, **end)

    def switch(self, policy: Policy) -> None:
        self.policy, self.revision = policy, self.revision + 1
        assert switch_policy(self.store, self.fleet, policy, self.revision).moved == self.memory.switch(
            policy, self.revision
        )


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_both_queues_serve_the_same_order_over_time(store: redis.Redis, keys: Keys, name: str) -> None:
    rng, now, number = Random(3), time.time(), 0
    both = Both(store, keys, build_policy(name))
    for _ in range(60):
        entries = [some_entry(number + i, rng, now) for i in range(rng.randrange(8))]
        number += len(entries)
        both.put(*entries)
        for id_ in both.claim(rng.randrange(6), now):
            if rng.random() < 0.7:
                both.finish(id_, rng.randrange(1, 3500))
        now += rng.randrange(8)
    assert execute(store, both.fleet.release("gpu")) == both.memory.release("gpu")
    while both.claim(7, now):
        pass


@pytest.mark.parametrize("seed", range(3))
def test_both_queues_drop_the_same_requests_for_higher_ones(store: redis.Redis, keys: Keys, seed: int) -> None:
    rng, num_shed = Random(seed), 0
    both = Both(store, keys, build_policy("fifo"))
    for number in range(250):
        entry = some_entry(number, rng, 1000.0)
        # Levels of which there are few, so that equals meet; bounds that the queue is nearly always at.
        entry = replace(entry, priority=rng.choice([1, 3, 5]), prompt_tokens=rng.randrange(1, 60), max_tokens=10)
        bounds: dict[str, Any] = {
            "revision": 1, "body": entry.id.encode(), "depth_limit": rng.choice([6, 6, 20]), "shed": rng.random() < 0.8,
            "tokens_limit": rng.choice([None, 300]),
        }  # fmt: skip
        place = both.policy.place(entry)
        answer = both.memory.enqueue(entry, place, **bounds)
        assert execute(store, both.fleet.enqueue(entry, place, **bounds)) == answer
        num_shed += len(answer.shed)
        if rng.random() < 0.4:
            both.claim(1, 1000.0)
    assert num_shed > 20


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_switch_brings_a_policys_rules_into_force(store: redis.Redis, keys: Keys, name: str) -> None:
    rng, now = Random(4), time.time()
    both = Both(store, keys, build_policy("fifo"))
    both.put(*(some_entry(i, rng, now) for i in range(120)))
    both.switch(build_policy(name))
    both.claim(40, now)
    both.switch(build_policy("fifo"))
    assert len(both.claim(100, now)) == 80


def test_a_claim_passes_any_number_of_late_requests_and_positions_know_of_it(store: redis.Redis, keys: Keys) -> None:
    now = 1000.0
    both = Both(store, keys, build_policy("edf"))
    fields: dict[str, Any] = {"tenant": "ada", "priority": 3, "arrival_s": 0.0, "prompt_tokens": 1, "max_tokens": 1}
    late = [QueueEntry(id=f"late{i}", deadline_s=10.0, **fields) for i in range(1500)]
    both.put(*late, *(QueueEntry(id=f"early{i}", deadline_s=5000.0, **fields) for i in range(2)))
    for id_, num_before in (("early1", 1), ("late0", 2), ("late9", 11)):
        position = both.memory.position(id_, now)
        assert position == execute(store, both.fleet.position(id_, now))
        assert position is not None
        assert position.in_flow == num_before
    assert both.claim(4, now) == ["early0", "early1", "late0", "late1"]
