"""The sweeper gives back what dead processes held."""

import time

import pytest
import redis

from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import execute
from scheduling.sweeper import GRACE_S, Sweeper
from scheduling.switch import switch_policy


@pytest.fixture
def queue(keys: Keys) -> FleetQueue:
    return FleetQueue(keys, "demo")


def enqueue(store: redis.Redis, queue: FleetQueue, id_: str, reply_to: str = "") -> None:
    entry = QueueEntry(id=id_, tenant="ada", priority=3, arrival_s=1.0, prompt_tokens=5, max_tokens=5)
    place, revision = build_policy("fifo").place(entry), execute(store, queue.active_policy()).revision
    command = queue.enqueue(
        entry, place, revision=revision, body=id_.encode(), depth_limit=100, reply_to=reply_to, keep_s=600
    )
    assert execute(store, command).status == "queued"


def claim(store: redis.Redis, queue: FleetQueue, owner: str, num: int, now: float | None = None) -> list[str]:
    command = queue.claim(owner, max_requests=num, max_tokens=100, lease_s=5, now=now)
    return [request.id for request in execute(store, command).requests]


def test_a_sweep_puts_the_requests_of_a_dead_engine_into_the_order_of_the_active_policy(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    for id_ in "ab":
        enqueue(store, queue, id_)
    claim(store, queue, "gpu-0", 2, now=0.0)
    switch_policy(store, queue, build_policy("fair"), 1)
    result = Sweeper(store, keys).sweep("demo")
    assert (result.expired, result.placed) == ([("gpu-0", 2)], 2)
    assert claim(store, queue, "gpu-1", 2) == ["a", "b"]
    assert Sweeper(store, keys).sweep("demo").expired == []


def test_the_requests_of_a_silent_web_process_are_cancelled_and_then_it_is_forgotten(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    enqueue(store, queue, "running", "web-1")
    enqueue(store, queue, "waiting", "web-1")
    enqueue(store, queue, "other", "web-2")
    claim(store, queue, "gpu", 1)
    store.zadd(keys.webs, {"web-1": time.time() - 1, "web-2": time.time() + 60})
    store.xadd(keys.replies("web-1"), {"m": b""})
    sweeper = Sweeper(store, keys)
    result = sweeper.sweep("demo")
    assert (result.cancelled, result.stopping) == ([b"waiting"], 1)
    assert execute(store, queue.take_cancels("gpu")) == ["running"]
    assert sweeper.forget_webs(["demo"]) == []
    execute(store, queue.finish("gpu", "running", 1, state="cancelled", used_tokens=5, finish=b"", output=""))
    assert sweeper.forget_webs(["demo"]) == ["web-1"]
    assert store.zrange(keys.webs, 0, -1) == [b"web-2"]
    assert not store.exists(keys.replies("web-1"))


def test_only_slots_whose_request_is_over_are_freed(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    limits = TenantLimits(keys)
    for id_ in ("waiting", "running", "ended", "lost"):
        execute(store, limits.acquire("ada", id_, rpm=None, tpm=None, concurrency=9, tokens=1))
    for id_ in ("ended", "running", "waiting"):
        enqueue(store, queue, id_)
    assert claim(store, queue, "gpu", 2) == ["ended", "running"]
    execute(store, queue.finish("gpu", "ended", 1, state="finished", used_tokens=5, finish=b"", output=""))
    assert Sweeper(store, keys).reconcile_slots(["ada"], ["demo"]) == 0, "all are young"
    later = Sweeper(store, keys, clock=lambda: time.time() + GRACE_S + 1)
    assert later.reconcile_slots(["ada", "bob"], ["demo"]) == 2
    slots = execute(store, limits.slots("ada", time.time() + 1))
    assert set(slots) == {"waiting", "running"}
