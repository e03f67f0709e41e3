"""The fleet queue in a real Redis: leases, fences, lost replies, lost scripts, bounded keys."""

import dataclasses
import struct
import threading
from collections import Counter
from typing import Any

import pytest
import redis
import redis.asyncio

from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import Claimed, FleetQueue
from scheduling.keys import Keys
from scheduling.store import Command, aexecute, execute, execute_many
from scheduling.switch import place_unplaced, switch_policy


@pytest.fixture
def queue(keys: Keys) -> FleetQueue:
    return FleetQueue(keys, "demo")


def entry_of(number: int, tenant: str = "ada", tokens: int = 10) -> QueueEntry:
    return QueueEntry(
        id=f"r{number:05d}",
        tenant=tenant,
        priority=number % 6,
        arrival_s=1000.0 + number,
        prompt_tokens=tokens,
        max_tokens=tokens,
    )


def fill(store: redis.Redis, queue: FleetQueue, num: int, *, keep_s: int = 60, reply_to: str = "") -> None:
    fifo = build_policy("fifo")
    commands = []
    for entry in (entry_of(i) for i in range(num)):
        place = fifo.place(entry)
        body = b"body of " + entry.id.encode()
        commands.append(
            queue.enqueue(entry, place, revision=0, body=body, depth_limit=10**6, keep_s=keep_s, reply_to=reply_to)
        )
    assert {answer.status for answer in execute_many(store, commands)} <= {"queued"}


def claim(store: redis.Redis, queue: FleetQueue, owner: str, num: int, *, now: float | None = None) -> Claimed:
    return execute(store, queue.claim(owner, max_requests=num, max_tokens=10**6, lease_s=5, now=now))


def ids_of(claimed: Claimed) -> list[str]:
    return [request.id for request in claimed.requests]


def tokens_of(*ids: int) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def test_a_body_comes_back_byte_for_byte(store: redis.Redis, queue: FleetQueue) -> None:
    entry, body = entry_of(0), bytes(range(256))
    place = build_policy("fifo").place(entry)
    execute(store, queue.enqueue(entry, place, revision=0, body=body, depth_limit=1))
    assert claim(store, queue, "gpu", 1).requests[0].body == body


def test_the_requests_of_a_dead_owner_go_back_at_their_old_rank_with_their_tokens(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fill(store, queue, 4)
    claim(store, queue, "gpu-0", 2, now=100.0)
    execute(store, queue.journal("gpu-0", [("r00001", 1, 0, tokens_of(7, 8))]))
    assert execute(store, queue.expire(104.9)) == []
    assert execute(store, queue.expire(105.0)) == [("gpu-0", 2)]
    assert execute(store, queue.renew("gpu-0", 5)) is False
    again = claim(store, queue, "gpu-1", 4)
    assert ids_of(again) == ["r00000", "r00001", "r00002", "r00003"]
    assert [(r.attempt, r.tokens) for r in again.requests[:2]] == [(2, []), (2, [7, 8])]


@pytest.mark.parametrize("by_claim", [False, True], ids=["by its heartbeat", "by a claim"])
def test_an_owner_that_comes_back_after_its_lease_ended_takes_the_failures_of_its_requests_back(
    store: redis.Redis, queue: FleetQueue, by_claim: bool
) -> None:
    fill(store, queue, 3)
    claim(store, queue, "away", 2, now=100.0)
    claim(store, queue, "dead", 1, now=100.0)
    expired = execute(store, queue.expire(200.0))
    assert sorted(expired) == [("away", 2), ("dead", 1)]
    if by_claim:
        execute(store, queue.claim("away", max_requests=0, max_tokens=0, lease_s=5.0, now=200.0))
    else:
        assert execute(store, queue.renew("away", 5.0, 200.0)) is False
    again = claim(store, queue, "other", 3, now=200.0)
    assert [(request.id, request.failures) for request in again.requests] == [
        ("r00000", 0), ("r00001", 0), ("r00002", 1),
    ]  # fmt: skip


def test_a_cancel_whose_reply_was_lost_gives_the_same_answer_again_and_another_one_does_not(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fill(store, queue, 1)
    command = queue.cancel("r00000")
    answer = execute(store, command)
    assert (answer.status, answer.body is None) == ("queued", False)
    assert execute(store, command) == answer
    assert execute(store, queue.cancel("r00000")).status == "gone"
    assert execute(store, queue.snapshot()).cancelled_total == 1


def test_a_release_that_is_repeated_leaves_a_new_attempt_alone_and_counts_one_failure(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fill(store, queue, 1)
    claim(store, queue, "gpu", 1)
    command = queue.release("gpu", {"r00000": 1, "nobody": 1}, failed=True)
    assert execute(store, command) == 1
    [again] = claim(store, queue, "gpu", 1).requests
    assert (again.attempt, again.failures) == (2, 1)
    assert execute(store, command) == 0, "its reply was lost, and the same engine has the request again"
    assert execute(store, queue.snapshot()).running == 1
    assert execute(store, queue.release("gpu", {"r00000": 2})) == 1
    assert claim(store, queue, "gpu", 1).requests[0].failures == 1


def test_renewing_keeps_the_lease(store: redis.Redis, queue: FleetQueue) -> None:
    fill(store, queue, 1)
    claim(store, queue, "gpu", 1, now=100.0)
    assert execute(store, queue.renew("gpu", 5, 104.0))
    assert execute(store, queue.expire(108.0)) == []


def test_without_a_time_given_scripts_go_by_the_clock_of_redis(store: redis.Redis, queue: FleetQueue) -> None:
    fill(store, queue, 1)
    claim(store, queue, "gpu", 1)
    assert execute(store, queue.expire()) == []
    seconds, _ = store.time()
    assert execute(store, queue.expire(seconds + 6.0)) == [("gpu", 1)]


def test_who_lost_a_request_can_neither_write_its_journal_nor_finish_it(store: redis.Redis, queue: FleetQueue) -> None:
    fill(store, queue, 1)
    claim(store, queue, "gpu-0", 1, now=0.0)
    execute(store, queue.expire(10.0))
    claim(store, queue, "gpu-1", 1)
    late = ("r00000", 1, 0, tokens_of(1))
    assert execute(store, queue.journal("gpu-0", [late])) == ["r00000"]
    # Not even under its own name with the old attempt.
    assert execute(store, queue.journal("gpu-1", [late])) == ["r00000"]
    ends = [
        queue.finish(owner, "r00000", attempt, state="finished", used_tokens=1, finish=b"", output="")
        for owner, attempt in [("gpu-0", 1), ("gpu-1", 1), ("gpu-1", 2), ("gpu-1", 2)]
    ]
    assert execute_many(store, ends) == [False, False, True, False]
    assert execute(store, queue.tokens("r00000")) == []


def test_a_journal_append_that_is_repeated_or_overlaps_adds_each_token_once(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fill(store, queue, 1)
    claim(store, queue, "gpu", 1)
    for start, tokens in [(0, (1, 2)), (0, (1, 2)), (1, (2, 3)), (3, (4,)), (1, (2,)), (4, ())]:
        assert execute(store, queue.journal("gpu", [("r00000", 1, start, tokens_of(*tokens))])) == []
    assert execute(store, queue.tokens("r00000")) == [1, 2, 3, 4]


def test_a_gap_in_the_journal_sends_the_request_back_to_the_queue(store: redis.Redis, queue: FleetQueue) -> None:
    fill(store, queue, 1)
    claim(store, queue, "gpu", 1)
    execute(store, queue.journal("gpu", [("r00000", 1, 0, tokens_of(7, 8))]))
    assert execute(store, queue.journal("gpu", [("r00000", 1, 5, tokens_of(1))])) == ["r00000"]
    [again] = claim(store, queue, "gpu", 1).requests
    assert (again.attempt, again.tokens) == (2, [7, 8])


def test_a_claim_repeated_under_its_number_gives_the_same_requests_and_claims_no_more(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fill(store, queue, 5)
    command = queue.claim("gpu", max_requests=2, max_tokens=1000, lease_s=5, number=1)
    first = execute(store, command)
    assert execute(store, command) == first
    execute(store, queue.finish("gpu", "r00000", 1, state="finished", used_tokens=1, finish=b"", output=""))
    assert ids_of(execute(store, command)) == ["r00001"]
    following = execute(store, queue.claim("gpu", max_requests=2, max_tokens=1000, lease_s=5, number=2))
    assert ids_of(following) == ["r00002", "r00003"]


def test_a_cancel_reaches_the_owner_until_it_obeys(store: redis.Redis, queue: FleetQueue) -> None:
    fill(store, queue, 2)
    claim(store, queue, "gpu", 1)
    assert execute(store, queue.cancel("r00000")).status == "running"
    assert execute(store, queue.cancel("r00000")).owner == "gpu"
    waiting = execute(store, queue.cancel("r00001"))
    assert (waiting.status, waiting.body) == ("queued", b"body of r00001")
    assert execute(store, queue.cancel("r00001")).status == "gone"
    assert execute(store, queue.take_cancels("gpu")) == execute(store, queue.take_cancels("gpu")) == ["r00000"]
    execute(store, queue.finish("gpu", "r00000", 1, state="cancelled", used_tokens=1, finish=b"", output=""))
    assert execute(store, queue.take_cancels("gpu")) == []


def test_everything_about_a_request_that_ended_has_a_time_to_live_and_nothing_else_is_left(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fill(store, queue, 6, keep_s=30, reply_to="web-1")
    claim(store, queue, "gpu", 4)
    execute(store, queue.journal("gpu", [(f"r{i:05d}", 1, 0, tokens_of(1)) for i in range(4)]))
    for i in range(4):
        execute(store, queue.finish("gpu", f"r{i:05d}", 1, state="finished", used_tokens=2, finish=b"", output=""))
    for i in range(4, 6):
        execute(store, queue.cancel(f"r{i:05d}"))
    execute(store, queue.expire(float(2**40)))
    left = {key.decode().removeprefix(f"{queue.base}:") for key in store.scan_iter(f"{queue.base}:*")}
    lasting = {name for name in left if int(store.ttl(f"{queue.base}:{name}")) < 0}
    assert lasting <= {"meta", "bell"}, lasting
    assert all(int(store.ttl(f"{queue.base}:{name}")) <= 30 for name in left - lasting)
    assert int(store.llen(f"{queue.base}:bell")) <= 64
    assert int(store.hlen(f"{queue.base}:meta")) < 20


def test_scripts_that_the_server_forgot_are_loaded_again_also_in_a_pipeline(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fill(store, queue, 2)
    store.script_flush()
    fifo, entry = build_policy("fifo"), entry_of(2)
    commands: list[Command[Any]] = [
        queue.enqueue(entry, fifo.place(entry), revision=0, body=b"", depth_limit=9),
        queue.claim("gpu", max_requests=9, max_tokens=1000, lease_s=5),
    ]
    answers = execute_many(store, commands)
    assert answers[0].status == "queued"
    assert len(answers[1].requests) == 3


async def test_an_asyncio_client_runs_the_same_commands(astore: redis.asyncio.Redis, queue: FleetQueue) -> None:
    entry = entry_of(0)
    place = build_policy("fifo").place(entry)
    enqueued = await aexecute(astore, queue.enqueue(entry, place, revision=0, body=b"x", depth_limit=1, reply_to="w"))
    assert enqueued.status == "queued"
    assert await aexecute(astore, queue.reply_to_requests("w")) == ["r00000"]
    assert (await aexecute(astore, queue.snapshot())).oldest_arrival_s == 1000.0


def test_requests_whose_record_was_evicted_hold_up_nobody(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    fill(store, queue, 4)
    store.delete(keys.request("demo", "r00000"), keys.request("demo", "r00002"))
    assert ids_of(claim(store, queue, "gpu", 9)) == ["r00001", "r00003"]
    place = build_policy("fifo").place(entry_of(9))
    execute(store, queue.enqueue(entry_of(9), place, revision=0, body=b"", depth_limit=9))
    store.delete(f"{queue.base}:e0:f:all")
    assert ids_of(claim(store, queue, "gpu", 9)) == []
    execute(store, queue.enqueue(entry_of(8), place, revision=0, body=b"", depth_limit=9))
    assert ids_of(claim(store, queue, "gpu", 9)) == ["r00008"]


def test_what_waits_is_counted_anew_where_a_record_has_vanished(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    fill(store, queue, 4)
    each = execute(store, queue.snapshot()).waiting_tokens // 4
    store.delete(keys.request("demo", "r00000"), keys.request("demo", "r00002"))
    assert ids_of(claim(store, queue, "gpu", 1)) == ["r00001"]
    left = execute(store, queue.snapshot())
    assert (left.depth, left.waiting_tokens) == (1, each)
    assert sum(left.by_tenant.values()) == sum(left.by_priority.values()) == 1
    switch_policy(store, queue, build_policy("fair"), 1)
    execute(store, queue.release("gpu"))
    store.delete(keys.request("demo", "r00001"))
    assert place_unplaced(store, queue) == 0
    assert execute(store, queue.snapshot()).depth == 1
    assert ids_of(claim(store, queue, "gpu", 9)) == ["r00003"]
    empty = execute(store, queue.snapshot())
    assert (empty.depth, empty.waiting_tokens, empty.by_tenant, empty.by_priority) == (0, 0, {}, {})


def check_counts(store: redis.Redis, queue: FleetQueue) -> None:
    """What is counted is what waits."""
    waiting, counted = execute(store, queue.sample(10**6)), execute(store, queue.snapshot())
    assert (counted.depth, counted.waiting_tokens) == (len(waiting), sum(entry.cost_tokens for entry in waiting))
    assert counted.by_tenant == Counter(entry.tenant for entry in waiting)
    assert counted.by_priority == Counter(entry.priority for entry in waiting)


def num_read(store: redis.Redis) -> int:
    return int(store.info("commandstats").get("cmdstat_hget", {}).get("calls", 0))


def test_a_long_queue_is_counted_anew_in_steps_while_requests_come_and_go(
    store: redis.Redis, keys: Keys, queue: FleetQueue
) -> None:
    num = 1700
    fill(store, queue, num)
    store.delete(keys.request("demo", "r00001"), keys.request("demo", "r01600"))
    steps = 0
    fifo, meta = build_policy("fifo"), f"{queue.base}:meta"
    while not steps or store.hexists(meta, "recounting"):
        before = num_read(store)
        held = claim(store, queue, "gpu", 2).requests
        assert num_read(store) - before < 300, "one call holds up the server for no longer"
        # Among those that are counted by now, and among the others: cancelled, given back, come anew.
        for number in (10 + steps, 1500 + steps):
            assert execute(store, queue.cancel(f"r{number:05d}")).status == "queued"
        execute(store, queue.release("gpu", {held[-1].id: held[-1].attempt}))
        for arrival in (1000.5, 5000.0):
            entry = dataclasses.replace(entry_of(num, tenant="bob"), arrival_s=arrival)
            execute(store, queue.enqueue(entry, fifo.place(entry), revision=0, body=b"", depth_limit=10**6))
            num += 1
        steps += 1
    assert steps > 5
    check_counts(store, queue)
    left: Any = store.hkeys(meta)
    assert not [field for field in left if field.startswith((b"r:", b"recount"))]
    store.delete(keys.request("demo", "r00900"))
    while claim(store, queue, "gpu", 100).requests:
        pass
    check_counts(store, queue)
    execute(store, queue.release("gpu"))
    check_counts(store, queue)


def test_an_enqueue_rings_the_bell_of_a_waiting_engine(store: redis.Redis, keys: Keys, queue: FleetQueue) -> None:
    fill(store, queue, 1)
    assert store.blpop([keys.bell("demo")], timeout=5) is not None


def test_concurrent_owners_and_enqueues_claim_every_request_exactly_once(
    redis_url: str, store: redis.Redis, queue: FleetQueue
) -> None:
    claimed: list[list[str]] = [[] for _ in range(4)]
    done = threading.Event()

    def work(n: int) -> None:
        with redis.Redis.from_url(redis_url) as client:
            while True:
                over = done.is_set()
                ids = ids_of(claim(client, queue, f"gpu-{n}", 3))
                claimed[n].extend(ids)
                if over and not ids:
                    return

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    fill(store, queue, 500)
    done.set()
    for thread in threads:
        thread.join(30)
    everything = [id_ for ids in claimed for id_ in ids]
    assert sorted(everything) == [f"r{i:05d}" for i in range(500)]
    assert all(ids == sorted(ids) for ids in claimed), "each owner is served in order of arrival"


def test_one_owner_may_hold_requests_of_more_tenants_than_lua_has_stack_for(
    store: redis.Redis, queue: FleetQueue
) -> None:
    fair, num = build_policy("fair"), 4500
    assert execute(store, queue.init_policy("fair", fair.params, 1))
    entries = [entry_of(i, tenant=f"tenant-{i}") for i in range(num)]
    execute_many(
        store,
        [
            queue.enqueue(entry, fair.place(entry), revision=1, body=b"", depth_limit=10**6, shed=True)
            for entry in entries
        ],
    )
    assert len(claim(store, queue, "gpu", num, now=0.0).requests) == num
    assert execute(store, queue.snapshot()).by_tenant == {}
    assert execute(store, queue.expire(now=10.0)) == [("gpu", num)]
    snapshot = execute(store, queue.snapshot())
    assert (snapshot.depth, len(snapshot.by_tenant), snapshot.running) == (num, num, 0)
