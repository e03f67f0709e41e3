"""The queue in Redis and the one in memory are driven step by step with the same operations and answer the same."""

import struct
import uuid
from collections import Counter
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from scheduling.core.policies import POLICIES, Policy, build_policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.store import Command, execute, execute_many
from scheduling.switch import switch_policy

OWNER_NAMES = ["gpu-0:1", "gpu-1:1", "gpu-2:1"]
OWNERS = st.sampled_from(OWNER_NAMES)
POLICY = st.sampled_from(["fair", *sorted(POLICIES)])
TENANTS = st.sampled_from(["ada", "bob", "cleo", "dän"])
TIMES = st.floats(0, 1000)


class BothQueues(RuleBasedStateMachine):
    """Every rule runs an operation on both queues and compares the answers; invariants compare what can be read."""

    client: redis.Redis

    @initialize(name=POLICY)
    def start(self, name: str) -> None:
        self.now = 0.0
        self.memory = FlowQueue(clock=lambda: 0.0)
        self.fleet = FleetQueue(Keys(f"h{uuid.uuid4().hex[:12]}"), "demo")
        self.policy: Policy = build_policy(name)
        self.revision = 1
        self.ids: list[str] = []
        self.claims = 0
        self.run(self.fleet.init_policy(name, self.policy.params, 1))
        assert self.memory.init_policy(name, self.policy.params, 1)

    def run(self, command: Command[Any]) -> Any:
        return execute(self.client, command)

    def pick(self, index: int) -> str:
        return self.ids[index % len(self.ids)] if self.ids else "nobody"

    @rule(
        tenant=TENANTS,
        priority=st.integers(0, 5),
        arrival_s=TIMES,
        tokens=st.tuples(st.integers(1, 50), st.integers(1, 50)),
        share=st.sampled_from([0.3, 1.0, 2.0, 7.0]),
        stale=st.integers(0, 9),
        depth_limit=st.sampled_from([3, 100, 100, 100]),
        web=st.sampled_from(["", "web-1"]),
        deadline_s=st.none() | TIMES,
        tokens_limit=st.sampled_from([None, None, 100, 300]),
        shed=st.booleans(),
        drop_expired=st.booleans(),
    )
    def enqueue(
        self,
        tenant: str,
        priority: int,
        arrival_s: float,
        tokens: tuple[int, int],
        share: float,
        stale: int,
        depth_limit: int,
        web: str,
        deadline_s: float | None = None,
        tokens_limit: int | None = None,
        shed: bool = False,
        drop_expired: bool = False,
    ) -> None:
        id_ = f"r{len(self.ids)}"
        entry = QueueEntry(
            id=id_,
            tenant=tenant,
            priority=priority,
            arrival_s=arrival_s,
            prompt_tokens=tokens[0],
            max_tokens=tokens[1],
            share=share,
            deadline_s=deadline_s,
            drop_expired=drop_expired,
        )
        revision = self.revision - (stale == 0)
        args: dict[str, Any] = {
            "revision": revision, "body": id_.encode(), "depth_limit": depth_limit, "reply_to": web,
            "tokens_limit": tokens_limit, "shed": shed,
        }  # fmt: skip
        place = self.policy.place(entry)
        answer = self.memory.enqueue(entry, place, **args)
        assert self.run(self.fleet.enqueue(entry, place, **args)) == answer
        assert self.run(self.fleet.enqueue(entry, place, **args)) == self.memory.enqueue(entry, place, **args)
        if answer.status == "queued":
            self.ids.append(id_)

    @rule(burst=st.lists(st.tuples(TENANTS, st.integers(0, 5), TIMES, st.integers(1, 50)), min_size=4, max_size=12))
    def enqueue_many(self, burst: list[tuple[str, int, float, int]]) -> None:
        for tenant, priority, arrival_s, tokens in burst:
            share = 1.0 + priority
            self.enqueue(tenant, priority, arrival_s, (tokens, tokens), share, stale=1, depth_limit=100, web="web-2")

    @rule(owner=OWNERS, num=st.integers(1, 8))
    def serve(self, owner: str, num: int) -> None:
        self.claim(owner, num, 100_000, again=False)

    @rule(
        owner=OWNERS,
        requests=st.integers(0, 5),
        tokens=st.sampled_from([30, 200, 10_000]),
        again=st.booleans(),
        max_priority=st.sampled_from([None, None, 0, 2, 4]),
    )
    def claim(self, owner: str, requests: int, tokens: int, again: bool, max_priority: int | None = None) -> None:
        self.claims += 1
        args: dict[str, Any] = {
            "max_requests": requests, "max_tokens": tokens, "lease_s": 5.0, "now": self.now, "number": self.claims,
            "max_priority": max_priority,
        }  # fmt: skip
        answer = self.memory.claim(owner, **args)
        assert self.run(self.fleet.claim(owner, **args)) == answer
        if again:
            repeated = self.run(self.fleet.claim(owner, **args))
            assert repeated == self.memory.claim(owner, **args) == answer._replace(dropped=(), more=False)

    @rule(limit=st.integers(1, 3), elapsed_s=st.floats(0, 300))
    def drop_expired(self, limit: int, elapsed_s: float) -> None:
        self.now += elapsed_s
        dropped = self.run(self.fleet.drop_expired(self.now, limit))
        assert dropped == self.memory.drop_expired(self.now, limit)
        assert all(shed.reason == "deadline_exceeded" for shed in dropped)

    @rule(owner=OWNERS, index=st.integers(0), start=st.integers(0, 3), num=st.integers(1, 3), attempt=st.integers(0, 3))
    def journal(self, owner: str, index: int, start: int, num: int, attempt: int) -> None:
        record = self.memory.record(self.pick(index))
        attempt = attempt if attempt or record is None else record.attempt
        start = start if start or record is None else record.num_tokens
        appends = [(self.pick(index), attempt, start, struct.pack(f"<{num}i", *range(start, start + num)))]
        assert self.run(self.fleet.journal(owner, appends)) == self.memory.journal(owner, appends)
        assert self.run(self.fleet.tokens(self.pick(index))) == self.memory.tokens(self.pick(index))

    @rule(owner=OWNERS, index=st.integers(0), used=st.integers(0, 120), wrong=st.integers(0, 5))
    def finish(self, owner: str, index: int, used: int, wrong: int) -> None:
        id_ = self.pick(index)
        record = self.memory.record(id_)
        attempt = (record.attempt if record else 1) + (wrong == 0)
        args: dict[str, Any] = {"state": "finished", "used_tokens": used, "finish": b"end", "output": "text"}
        assert self.run(self.fleet.finish(owner, id_, attempt, **args)) == self.memory.finish(
            owner, id_, attempt, **args
        )

    @rule(index=st.integers(0))
    def end_shed(self, index: int) -> None:
        ended = self.memory.end_shed(self.pick(index), b"finish")
        assert self.run(self.fleet.end_shed(self.pick(index), b"finish")) == ended
        assert self.run(self.fleet.end_shed(self.pick(index), b"finish")) is False
        assert set(self.run(self.fleet.shed_before(1e12))) == set(self.memory.shed_before(1e12))

    @rule(index=st.integers(0), token=st.sampled_from(["web-1", "web-2"]))
    def cancel(self, index: int, token: str) -> None:
        answer = self.run(self.fleet.cancel(self.pick(index), token))
        assert answer == self.memory.cancel(self.pick(index), token)
        assert self.run(self.fleet.cancel(self.pick(index), token)) == answer, "a lost reply changes nothing"

    @rule(owner=OWNERS)
    def renew(self, owner: str) -> None:
        assert self.run(self.fleet.renew(owner, 5.0, self.now)) == self.memory.renew(owner, 5.0, self.now)

    @rule(owner=OWNERS)
    def end_lease(self, owner: str) -> None:
        assert self.run(self.fleet.end_lease(owner, 1.0, self.now)) == self.memory.end_lease(owner, 1.0, self.now)

    @rule(
        owner=OWNERS,
        chosen=st.none() | st.lists(st.tuples(st.integers(0), st.sampled_from([0, 0, 0, 1])), max_size=3),
        failed=st.booleans(),
    )
    def release(self, owner: str, chosen: list[tuple[int, int]] | None, failed: bool = False) -> None:
        attempts: dict[str, int] | None = None if chosen is None else {}
        for index, behind in chosen or ():
            record = self.memory.record(self.pick(index))
            attempts[self.pick(index)] = record.attempt - behind if record else 1  # type: ignore[index]
        num_released = self.memory.release(owner, attempts, failed=failed)
        assert self.run(self.fleet.release(owner, attempts, failed=failed)) == num_released
        assert self.run(self.fleet.release(owner, attempts, failed=failed)) == 0, "a lost reply changes nothing"

    @rule(elapsed_s=st.floats(0, 10))
    def expire(self, elapsed_s: float) -> None:
        self.now += elapsed_s
        assert self.run(self.fleet.expire(self.now)) == self.memory.expire(self.now)

    @rule(elapsed_s=st.floats(0, 400))
    def wait(self, elapsed_s: float) -> None:
        self.now += elapsed_s

    @rule(flow=TENANTS, weight=st.sampled_from([0.5, 1.0, 3.0]))
    def set_weight(self, flow: str, weight: float) -> None:
        assert self.run(self.fleet.set_weight(flow, weight)) == self.memory.set_weight(flow, weight)

    @rule(name=POLICY, weights=st.dictionaries(TENANTS, st.sampled_from([0.5, 1.0, 3.0])))
    def switch(self, name: str, weights: dict[str, float]) -> None:
        self.policy, self.revision = build_policy(name), self.revision + 1
        result = switch_policy(self.client, self.fleet, self.policy, self.revision, weights=lambda: weights)
        assert result.moved == self.memory.switch(self.policy, self.revision, weights)

    @rule()
    def place_unplaced(self) -> None:
        active, entries = self.run(self.fleet.unplaced())
        expected, same = self.memory.unplaced()
        entries.sort(key=lambda entry: entry.id)
        assert (active, entries) == (expected, sorted(same, key=lambda entry: entry.id))
        rows = [(entry.id, self.policy.place(entry)) for entry in entries]
        assert self.run(self.fleet.place(rows, revision=self.revision - 1)) == 0
        assert self.run(self.fleet.place(rows, revision=self.revision)) == self.memory.place(
            rows, revision=self.revision
        )

    @rule(index=st.integers(0))
    def look(self, index: int) -> None:
        id_ = self.pick(index)
        assert self.run(self.fleet.record(id_)) == self.memory.record(id_)
        assert self.run(self.fleet.position(id_, self.now)) == self.memory.position(id_, self.now)

    @invariant()
    def what_can_be_read_is_the_same(self) -> None:
        assert self.run(self.fleet.snapshot()) == self.memory.snapshot()
        assert self.run(self.fleet.active_policy()) == self.memory.active_policy()
        assert set(self.run(self.fleet.reply_to_requests("web-1"))) == set(self.memory.reply_to_requests("web-1"))
        for owner in OWNER_NAMES:
            assert self.run(self.fleet.take_cancels(owner)) == self.memory.take_cancels(owner)
        commands = [self.fleet.position(id_, self.now) for id_ in self.ids]
        assert execute_many(self.client, commands) == [self.memory.position(id_, self.now) for id_ in self.ids]

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        told = execute_many(self.client, [self.fleet.record(id_) for id_ in self.ids])
        states = Counter(record.state for record in told)
        now = self.run(self.fleet.snapshot())
        assert len(told) == states.total() == now.enqueued_total == len(self.ids)
        assert (states["queued"], states["running"]) == (now.depth, now.running)
        ended = now.finished_total + now.cancelled_total + now.shed_total + now.expired_total
        assert ended == states["finished"] + states["cancelled"] + states["failed"]
        held = [id_ for owner in OWNER_NAMES for id_ in self.client.hkeys(f"{self.fleet.base}:own:{owner}")]
        assert len(held) == len(set(held)) == now.running, "two owners hold one request"

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.everything_drains_in_the_same_order()
            self.client.delete(*self.all_keys())

    def all_keys(self) -> list[bytes]:
        return list(self.client.scan_iter(f"{self.fleet.base}:*", count=10_000))

    def everything_drains_in_the_same_order(self) -> None:
        self.place_unplaced()
        for owner in OWNER_NAMES:
            self.release(owner, None)
        self.place_unplaced()
        self.claim("gpu-0:1", 10_000, 10_000_000, again=False)
        assert self.memory.snapshot().depth == 0
        for id_ in self.ids:
            record = self.memory.record(id_)
            assert record is not None
            self.finish("gpu-0:1", self.ids.index(id_), 7, wrong=1)
        left = {key.removeprefix(self.fleet.base.encode()).split(b":")[1].decode() for key in self.all_keys()}
        epoch = f"e{self.revision - 1}"
        assert left <= {"meta", "owners", "last", "charged", "req", "tok", "bell", "epochs", "shed", epoch}, left
        assert execute_many(self.client, [self.fleet.record(id_) for id_ in self.ids]) == [
            self.memory.record(id_) for id_ in self.ids
        ]


@pytest.mark.parametrize("examples", [60])
def test_both_queues_give_the_same_answers_to_the_same_operations(store: redis.Redis, examples: int) -> None:
    class Machine(BothQueues):
        client = store

    # Without shrinking, which against a real server takes minutes.
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            phases=(Phase.reuse, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )
