"""What is given back is what was charged, also where limits or weights changed while a request ran."""

from typing import Any

import redis

from scheduling.core.policies import build_policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import Admission, TenantLimits
from scheduling.store import execute


def acquire(store: redis.Redis, keys: Keys, name: str, now: float, **limits: int) -> Admission:
    values: dict[str, Any] = {"rpm": None, "tpm": None, "concurrency": None, "tpd": None} | limits
    return execute(store, TenantLimits(keys).acquire("ada", name, tokens=40, now=now, **values))


def settle(store: redis.Redis, keys: Keys, name: str, now: float) -> None:
    execute(store, TenantLimits(keys).settle("ada", name, refund_tokens=40, now=now))


def test_a_request_from_before_a_limit_gives_nothing_back_to_it(store: redis.Redis, keys: Keys) -> None:
    acquire(store, keys, "before", 0.0)
    acquire(store, keys, "first", 1.0, tpm=60, tpd=100)
    settle(store, keys, "before", 1.0)
    assert acquire(store, keys, "second", 1.0, tpm=60, tpd=100).reason == "tokens_per_minute"
    assert acquire(store, keys, "third", 1.0, tpd=100).ok, "60 of the day's tokens are left, not 100"
    assert acquire(store, keys, "fourth", 1.0, tpd=100).reason == "tokens_per_day"
    settle(store, keys, "first", 1.0)
    assert acquire(store, keys, "fifth", 1.0, tpd=100).ok, "what was charged is given back"


def test_a_limit_that_was_lifted_meanwhile_begins_anew(store: redis.Redis, keys: Keys) -> None:
    acquire(store, keys, "first", 0.0, tpm=60)
    acquire(store, keys, "unlimited", 0.0)
    assert acquire(store, keys, "again", 1.0, tpm=60).remaining_tokens == 20
    settle(store, keys, "unlimited", 1.0)
    usage = execute(store, TenantLimits(keys).usage("ada", now=1.0))
    assert usage.remaining_tokens == 20


def test_a_request_that_goes_back_leaves_the_weight_that_its_tenant_got_meanwhile(
    store: redis.Redis, keys: Keys
) -> None:
    fleet, memory = FleetQueue(keys, "demo"), FlowQueue(clock=lambda: 0.0)
    entries = [
        QueueEntry(id=f"{tenant}{i}", tenant=tenant, priority=3, arrival_s=float(i), prompt_tokens=10, max_tokens=10)
        for i in range(9)
        for tenant in ("ada", "bob")
    ]
    fair = build_policy("fair")
    execute(store, fleet.init_policy("fair", fair.params, 1))
    memory.init_policy("fair", fair.params, 1)
    for entry in entries:
        execute(store, fleet.enqueue(entry, fair.place(entry), revision=1, body=b"", depth_limit=99))
        memory.enqueue(entry, fair.place(entry), revision=1, depth_limit=99)
    orders = []
    for served in (2, 8):
        room = {"max_requests": served, "max_tokens": 10**6, "lease_s": 60.0, "now": 0.0}
        claimed = execute(store, fleet.claim("gpu", **room))  # type: ignore[arg-type]
        assert [r.id for r in claimed.requests] == [r.id for r in memory.claim("gpu", **room).requests]  # type: ignore[arg-type]
        orders.append([request.id for request in claimed.requests])
        assert execute(store, fleet.set_weight("ada", 3.0)) == memory.set_weight("ada", 3.0)
        assert execute(store, fleet.release("gpu")) == memory.release("gpu")
    assert [sum(id_.startswith("ada") for id_ in order) for order in orders] == [1, 6]
