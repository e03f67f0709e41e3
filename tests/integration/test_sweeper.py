"""The sweeper gives back what dead processes held."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import redis

from inference.messages import Finish, InferenceRequest, RequestEvent, SequenceUpdate
from inference.sweeper import SECOND_LOOK_S, SLOT_GRACE_S, Sweeper
from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.core.sequence import SamplingParams
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import TIME, execute
from tests.integration.fleet import FleetClient

NOW_S = 1_760_000_000.0


@pytest.fixture
def queue(store: redis.Redis, keys: Keys) -> FleetQueue:
    store.hset(keys.deployments, "demo", "{}")
    return FleetQueue(keys, "demo")


def enqueue(
    store: redis.Redis, queue: FleetQueue, request_id: str, web: str, tpd: int | None = None, comes_again: bool = False
) -> None:
    request = InferenceRequest(
        id=request_id, model="demo", tenant="acme", priority=3, arrival_s=NOW_S, prompt_token_ids=[1, 2, 3],
        max_tokens=7, sampling=SamplingParams(), reply_to=web, charged_tokens=10, comes_again=comes_again,
    )  # fmt: skip
    entry = QueueEntry(id=request_id, tenant="acme", priority=3, arrival_s=NOW_S, prompt_tokens=3, max_tokens=7)
    limits = TenantLimits(queue.keys)
    execute(store, limits.acquire("acme", request_id, rpm=None, tpm=None, tpd=tpd, concurrency=9, tokens=10))
    body = msgspec.msgpack.encode(request)
    place = build_policy("fifo").place(entry)
    execute(store, queue.enqueue(entry, place, revision=0, body=body, depth_limit=99, reply_to=web))


def looks(first_s: float, *others_s: float) -> Callable[[], float]:
    """A clock that is looked at twice in each round and goes on after it; the last time stays."""
    times = [first_s, first_s, *(time_s for time_s in others_s for _ in range(2))]
    return lambda: times.pop(0) if len(times) > 1 else times[0]


def running(store: redis.Redis, keys: Keys) -> int:
    return execute(store, TenantLimits(keys).usage("acme")).running


def history(store: redis.Redis, keys: Keys) -> list[RequestEvent]:
    entries: list[Any] = store.xrange(keys.history) or []
    return [event for _, f in entries for event in msgspec.msgpack.decode(f[b"m"], type=list[RequestEvent])]


def test_a_request_that_cannot_be_read_stops_no_round(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    enqueue(store, queue, "r1", "web-dead")
    enqueue(store, queue, "r2", "web-dead")
    store.hset(keys.request("demo", "r1"), "body", b"\xc1 of another version")
    store.zadd(keys.webs, {"web-dead": NOW_S - 1})
    sweeper = Sweeper(store, keys, clock=looks(NOW_S, NOW_S + SECOND_LOOK_S))
    for _ in range(3):
        sweeper.run_once()
    assert execute(store, queue.snapshot()).depth == 0
    assert [event.id for event in history(store, keys)] == ["r2"]
    assert store.zscore(keys.webs, "web-dead") is None


def test_waiting_requests_of_a_dead_web_process_are_cancelled_settled_and_recorded(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    enqueue(store, queue, "r1", "web-dead")
    enqueue(store, queue, "r2", "web-alive")
    store.zadd(keys.webs, {"web-dead": NOW_S - 1, "web-alive": NOW_S + 5})
    sweeper = Sweeper(store, keys, clock=looks(NOW_S, NOW_S + SECOND_LOOK_S))
    for _ in range(3):
        sweeper.run_once()
    assert execute(store, queue.snapshot()).depth == 1
    assert running(store, keys) == 1
    (event,) = history(store, keys)
    assert (event.id, event.state, event.finish_reason, event.prompt_tokens) == ("r1", "cancelled", "cancelled", 3)
    assert store.zrange(keys.webs, 0, -1) == [b"web-alive"]


def test_running_requests_of_a_dead_web_process_are_stopped_before_it_is_forgotten(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    enqueue(store, queue, "r1", "web-dead")
    execute(store, queue.claim("gpu-0:1", max_requests=1, max_tokens=99, lease_s=60))
    store.zadd(keys.webs, {"web-dead": NOW_S - 1})
    sweeper = Sweeper(store, keys, clock=looks(NOW_S, NOW_S + SECOND_LOOK_S))
    sweeper.run_once()
    sweeper.run_once()
    assert execute(store, queue.take_cancels("gpu-0:1")) == ["r1"]
    assert store.zcard(keys.webs) == 1
    execute(store, queue.finish("gpu-0:1", "r1", 1, state="cancelled", used_tokens=3, finish=b"", output=""))
    sweeper.run_once()
    assert store.zcard(keys.webs) == 0


def test_a_web_process_that_beats_again_after_redis_was_away_keeps_its_requests(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    enqueue(store, queue, "r1", "web-1")
    now_s = execute(store, TIME)
    store.zadd(keys.webs, {"web-1": now_s - 60})
    sweeper = Sweeper(store, keys)
    sweeper.run_once()
    store.zadd(keys.webs, {"web-1": now_s + 60})
    sweeper.run_once()
    store.zadd(keys.webs, {"web-1": now_s - 60})
    sweeper.run_once()
    assert execute(store, queue.snapshot()).depth == 1, "a second silence is looked at anew"


def test_requests_of_a_dead_engine_go_back_to_the_queue(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    enqueue(store, queue, "r1", "web")
    execute(store, queue.claim("gpu-0:1", max_requests=1, max_tokens=99, lease_s=5, now=NOW_S))
    Sweeper(store, keys).run_once()
    snapshot = execute(store, queue.snapshot())
    assert (snapshot.depth, snapshot.running, snapshot.requeued_total) == (1, 0, 1)


def test_slots_of_lost_requests_are_freed_and_others_kept(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    enqueue(store, queue, "r1", "web")
    limits = TenantLimits(keys)
    execute(store, limits.acquire("acme", "lost", rpm=None, tpm=None, concurrency=9, tokens=0))
    sweeper = Sweeper(store, keys)
    sweeper.run_once()
    assert sweeper.free_slots(["acme"]) == 0, "too young to be sure"
    seconds, _ = store.time()
    later = Sweeper(store, keys, clock=lambda: seconds + SLOT_GRACE_S + 5)
    assert later.free_slots(["acme", "nobody"]) == 1
    assert running(store, keys) == 1


def test_a_worker_that_died_before_it_settled_leaves_that_to_the_sweeper(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    enqueue(store, queue, "r1", "web", tpd=10)
    execute(store, queue.claim("gpu-0:1", max_requests=1, max_tokens=99, lease_s=60))
    finish = msgspec.msgpack.encode(Finish("stop", 3, 2))
    ended = {"state": "finished", "used_tokens": 5, "finish": finish, "output": "ba be"}
    assert execute(store, queue.finish("gpu-0:1", "r1", 1, **ended))  # type: ignore[arg-type]
    ended_s = execute(store, TIME)
    free_slots_later(store, keys)
    (event,) = history(store, keys)
    assert (event.id, event.state, event.finish_reason, event.completion_tokens) == ("r1", "finished", "stop", 2)
    assert (event.prompt_tokens, event.attempts, event.claimed_s) == (3, 1, None)
    assert abs(event.finished_s - ended_s) < 60
    assert [spend(store, keys, tokens) for tokens in (6, 5)] == [False, True], "5 of the day's 10 tokens were used"


def test_a_web_process_that_died_before_it_settled_a_cancelled_request_leaves_that_to_the_sweeper(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    enqueue(store, queue, "r1", "web", tpd=10)
    execute(store, queue.cancel("r1"))
    free_slots_later(store, keys)
    (event,) = history(store, keys)
    assert (event.id, event.state, event.finish_reason, event.attempts) == ("r1", "cancelled", "cancelled", 0)
    assert spend(store, keys, 10), "all of the day's tokens are there again"


def spend(store: redis.Redis, keys: Keys, tokens: int) -> bool:
    """Whether another request may use so many of the day's ten tokens, and have the only slot."""
    acquire = TenantLimits(keys).acquire("acme", "r2", rpm=None, tpm=None, tpd=10, concurrency=1, tokens=tokens)
    return execute(store, acquire).ok


def free_slots_later(store: redis.Redis, keys: Keys) -> None:
    """As after the time in which whoever ended a request settles it."""
    later = Sweeper(store, keys, clock=lambda: execute(store, TIME) + SLOT_GRACE_S + 5)
    later.run_once()
    assert [later.free_slots(["acme"]) for _ in range(2)] == [1, 0]


def test_what_was_shed_by_a_process_that_died_is_ended_by_the_sweeper_once(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    enqueue(store, queue, "r1", "web-1")
    urgent = QueueEntry(id="r2", tenant="acme", priority=0, arrival_s=NOW_S, prompt_tokens=3, max_tokens=7)
    place = build_policy("fifo").place(urgent)
    answer = execute(store, queue.enqueue(urgent, place, revision=0, body=b"", depth_limit=1, shed=True))
    assert [shed.id for shed in answer.shed] == ["r1"]
    sweeper = Sweeper(store, keys)
    sweeper.run_once()
    assert history(store, keys) == [], "whoever shed it may still be at it"
    later = Sweeper(store, keys, clock=lambda: time.time() + 5)
    later.run_once()
    later.run_once()
    assert [(event.id, event.state, event.error_code) for event in history(store, keys)] == [("r1", "failed", "shed")]
    assert running(store, keys) == 0
    entries: list[Any] = store.xrange(keys.replies("web-1")) or []
    ((_, fields),) = entries
    (update,) = msgspec.msgpack.decode(fields[b"m"], type=list[SequenceUpdate])
    assert update.finish is not None
    assert (update.request_id, update.finish.reason, update.finish.error_code) == ("r1", "error", "shed")


def test_what_is_sent_again_has_not_failed_where_it_was_shed(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    urgent = QueueEntry(id="r0", tenant="acme", priority=0, arrival_s=NOW_S, prompt_tokens=3, max_tokens=7)
    for request_id in ("ended", "unsettled"):
        enqueue(store, queue, request_id, "", comes_again=True)
        place = build_policy("fifo").place(urgent)
        execute(store, queue.enqueue(urgent, place, revision=0, body=b"", depth_limit=1, shed=True))
        execute(store, queue.cancel("r0"))
        store.delete(keys.request("demo", "r0"))
        if request_id == "ended":
            Sweeper(store, keys, clock=lambda: time.time() + 5).run_once()
    finish = Finish("error", 3, 0, error_code="shed")
    assert execute(store, queue.end_shed("unsettled", msgspec.msgpack.encode(finish)))
    free_slots_later(store, keys)
    assert (history(store, keys), running(store, keys)) == ([], 0)


def test_a_deadline_that_no_claim_looks_at_is_found_by_the_sweeper(store: redis.Redis, keys: Keys) -> None:
    fleet = FleetClient(store, keys, "m")
    store.sadd(keys.models, "m")
    fleet.submit("late", [1, 2, 3], 5, deadline_s=time.time() - 1)
    fleet.submit("r", [1, 2, 3], 5, deadline_s=time.time() + 600)
    for _ in range(2):
        Sweeper(store, keys).run_once()
    fleet.until(lambda: fleet.answers["late"].finish)
    assert [(event.id, event.error_code) for event in history(store, keys)] == [("late", "deadline_exceeded")]
    assert execute(store, fleet.queue.snapshot()).depth == 1


def test_a_dropped_request_that_cannot_be_read_keeps_nobody_from_ending_the_others(
    store: redis.Redis, keys: Keys
) -> None:
    fleet = FleetClient(store, keys, "m")
    store.sadd(keys.models, "m")
    fleet.submit("strange", [1, 2, 3], 5, deadline_s=time.time() - 2, body=b"of another version")
    fleet.submit("late", [1, 2, 3], 5, deadline_s=time.time() - 1)
    Sweeper(store, keys).run_once()
    fleet.until(lambda: fleet.answers["late"].finish)
    record = execute(store, fleet.queue.record("strange"))
    assert record is not None
    assert record.finish is not None, "whose client looks there hears of it"
    assert msgspec.msgpack.decode(record.finish, type=Finish).error_code == "deadline_exceeded"
    assert execute(store, fleet.queue.shed_before(time.time() + 9)) == []
