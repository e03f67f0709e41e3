"""Switching the policy of a queue in use: fast, nothing lost or doubled, one at a time, no trace of one that died."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest
import redis

from scheduling import switch
from scheduling.core.policies import Policy, build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.store import execute, execute_many, load_script
from scheduling.switch import StaleRevision, SwitchInProgress, SwitchLost, place_unplaced, switch_policy


@pytest.fixture
def queue(keys: Keys) -> FleetQueue:
    return FleetQueue(keys, "demo")


def entry_of(number: int) -> QueueEntry:
    return QueueEntry(
        id=f"r{number:06d}",
        tenant=f"tenant{number % 7}",
        priority=number % 6,
        arrival_s=1e9 + number,
        prompt_tokens=10,
        max_tokens=20,
        share=1 + number % 3,
    )


def enqueue(client: redis.Redis, queue: FleetQueue, numbers: range) -> None:
    """As a web process does: place by the policy it believes in, again where that is stale."""
    active = execute(client, queue.active_policy())
    todo = [entry_of(number) for number in numbers]
    while todo:
        policy = build_policy(active.name, active.params)
        commands = [
            queue.enqueue(entry, policy.place(entry), revision=active.revision, body=b"x" * 300, depth_limit=10**6)
            for entry in todo
        ]
        answers = execute_many(client, commands)
        todo = [entry for entry, answer in zip(todo, answers, strict=True) if answer.status == "stale"]
        active = execute(client, queue.active_policy())


def drain(client: redis.Redis, queue: FleetQueue) -> list[str]:
    ids: list[str] = []
    while True:
        claimed = execute(client, queue.claim("drain", max_requests=500, max_tokens=10**9, lease_s=60))
        if not claimed.requests:
            return ids
        ids.extend(request.id for request in claimed.requests)


def expected_order(policy: Policy, numbers: range) -> list[str]:
    return [entry.id for entry in sorted((entry_of(n) for n in numbers), key=lambda e: (policy.place(e).rank, e.id))]


def cpu_s(client: redis.Redis) -> float:
    """CPU seconds used so far by this process and the server."""
    server = client.info("cpu")
    return time.process_time() + float(server["used_cpu_user_main_thread"]) + float(server["used_cpu_sys_main_thread"])


def test_ten_thousand_waiting_requests_are_in_the_new_order_in_under_250_ms(
    store: redis.Redis, queue: FleetQueue
) -> None:
    enqueue(store, queue, range(10_000))
    used_s = []
    for revision, name in enumerate(["fair", "fifo", "priority"], 1):
        start_s = cpu_s(store)
        assert switch_policy(store, queue, build_policy(name), revision).moved == 10_000
        used_s.append(cpu_s(store) - start_s)
    # Switcher and server work in turns, so this is the time it takes on a machine with nothing else to do.
    assert min(used_s) < 0.25
    assert drain(store, queue) == expected_order(build_policy("priority"), range(10_000))


def test_enqueues_claims_cancels_and_releases_during_switches_lose_and_double_nothing(
    redis_url: str, store: redis.Redis, queue: FleetQueue
) -> None:
    enqueue(store, queue, range(3000))
    stop, claimed, cancelled, errors = threading.Event(), Counter[str](), Counter[str](), list[BaseException]()

    def guarded(work: Iterator[None]) -> None:
        try:
            for _ in work:
                if stop.is_set():
                    return
        except BaseException as error:
            errors.append(error)

    def put() -> Iterator[None]:
        with redis.Redis.from_url(redis_url) as client:
            for start in range(3000, 6000, 20):
                enqueue(client, queue, range(start, start + 20))
            yield

    def take(owner: str) -> Iterator[None]:
        with redis.Redis.from_url(redis_url) as client:
            for turn in range(10**6):
                got = execute(client, queue.claim(owner, max_requests=3, max_tokens=10**6, lease_s=60))
                if turn % 3 == 0:
                    execute(client, queue.release(owner, {request.id: request.attempt for request in got.requests}))
                else:
                    claimed.update(request.id for request in got.requests)
                yield

    def cancel() -> Iterator[None]:
        with redis.Redis.from_url(redis_url) as client:
            for number in range(2999, 0, -7):
                if execute(client, queue.cancel(f"r{number:06d}")).status == "queued":
                    cancelled[f"r{number:06d}"] += 1
                yield

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (put(), take("a"), take("b"), cancel())]
    for thread in threads:
        thread.start()
    for revision in range(1, 13):
        switch_policy(store, queue, build_policy(["fair", "priority", "fifo"][revision % 3]), revision)
    threads[0].join(60)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not errors
    place_unplaced(store, queue)
    snapshot = execute(store, queue.snapshot())
    rest = drain(store, queue)
    assert snapshot.depth == len(rest)
    assert snapshot.revision == 12
    assert len(rest) > 100, "the queue ran dry before the switches were over: the test shows nothing"
    assert claimed + cancelled + Counter(rest) == Counter(f"r{n:06d}" for n in range(6000))


def test_after_the_switch_an_enqueue_placed_under_the_old_revision_is_stale(
    store: redis.Redis, queue: FleetQueue
) -> None:
    switch_policy(store, queue, build_policy("fair"), 4)
    entry = entry_of(0)
    place = build_policy("fifo").place(entry)
    answer = execute(store, queue.enqueue(entry, place, revision=0, body=b"", depth_limit=5))
    assert (answer.status, answer.revision) == ("stale", 4)


def test_a_request_running_during_a_switch_is_requeued_under_the_new_policy(
    store: redis.Redis, queue: FleetQueue
) -> None:
    enqueue(store, queue, range(12))
    execute(store, queue.claim("gpu", max_requests=6, max_tokens=10**6, lease_s=5, now=0.0))
    priority = build_policy("priority", {"level_s": 100.0})
    switch_policy(store, queue, priority, 1)
    assert execute(store, queue.expire(10.0)) == [("gpu", 6)]
    active, entries = execute(store, queue.unplaced())
    assert (active.revision, len(entries)) == (1, 6)
    # Reading removes nothing, and a placement under an old revision is refused: who dies in between loses nothing.
    assert execute(store, queue.place([(e.id, priority.place(e)) for e in entries], revision=0)) == 0
    assert place_unplaced(store, queue) == 6
    assert place_unplaced(store, queue) == 0
    assert drain(store, queue) == expected_order(priority, range(12))


def test_a_request_left_unplaced_is_placed_by_the_next_switch_or_can_be_cancelled(
    store: redis.Redis, queue: FleetQueue
) -> None:
    enqueue(store, queue, range(3))
    execute(store, queue.claim("gpu", max_requests=3, max_tokens=10**6, lease_s=5))
    switch_policy(store, queue, build_policy("fair"), 1)
    execute(store, queue.release("gpu"))
    assert execute(store, queue.cancel("r000001")).status == "queued"
    assert switch_policy(store, queue, build_policy("fifo"), 2).moved == 2
    assert execute(store, queue.unplaced())[1] == []
    assert drain(store, queue) == ["r000000", "r000002"]


def test_an_unplaced_request_that_lost_its_record_keeps_no_other_from_its_place(
    store: redis.Redis, queue: FleetQueue
) -> None:
    enqueue(store, queue, range(3))
    execute(store, queue.claim("gpu", max_requests=3, max_tokens=10**6, lease_s=5))
    fair = build_policy("fair")
    switch_policy(store, queue, fair, 1)
    execute(store, queue.release("gpu"))
    _, entries = execute(store, queue.unplaced())
    store.delete(queue.keys.request(queue.model, "r000001"))
    assert execute(store, queue.place([(e.id, fair.place(e)) for e in entries], revision=1)) == 2
    assert execute(store, queue.unplaced())[1] == []
    assert drain(store, queue) == ["r000000", "r000002"]


def test_two_switches_at_once_are_refused_and_one_that_died_blocks_nobody(
    store: redis.Redis, queue: FleetQueue
) -> None:
    enqueue(store, queue, range(1200))
    dead = switch._Build(store, queue, build_policy("fair"), "token of the dead")
    dead.begin(1)
    dead.fill()
    with pytest.raises(SwitchInProgress):
        switch_policy(store, queue, build_policy("priority"), 2)
    store.delete(f"{queue.base}:switch")  # what the lock's time to live does 5 s later
    enqueue(store, queue, range(1200, 1300))
    assert switch_policy(store, queue, build_policy("priority"), 2).moved == 1300
    with pytest.raises(SwitchLost):
        dead.flip(1)
    assert execute(store, queue.active_policy()).name == "priority"
    assert drain(store, queue) == expected_order(build_policy("priority"), range(1300))
    epochs = {key.decode().removeprefix(f"{queue.base}:").split(":")[0] for key in store.scan_iter(f"{queue.base}:e*")}
    assert epochs <= {"e2", "epochs"}, "what the dead switch had built is gone"


def test_the_scripts_of_a_switch_are_loaded_before_its_first_step(store: redis.Redis, queue: FleetQueue) -> None:
    store.script_flush()
    with pytest.raises(StaleRevision):
        switch_policy(store, queue, build_policy("fair"), 0)
    assert all(store.script_exists(*(load_script(name).sha for name in switch.SCRIPTS)))


def test_a_revision_must_grow_and_repeating_the_active_one_does_nothing(store: redis.Redis, queue: FleetQueue) -> None:
    enqueue(store, queue, range(3))
    fair = build_policy("fair")
    assert switch_policy(store, queue, fair, 5).moved == 3
    assert switch_policy(store, queue, fair, 5).moved == 0
    with pytest.raises(StaleRevision):
        switch_policy(store, queue, build_policy("fifo"), 5)
    with pytest.raises(StaleRevision):
        switch_policy(store, queue, fair, 4)


def test_a_switch_of_an_empty_queue_works_and_a_first_policy_needs_an_empty_one(
    store: redis.Redis, queue: FleetQueue
) -> None:
    enqueue(store, queue, range(1))
    assert execute(store, queue.init_policy("fair", {"level_s": 30.0}, 3)) is False
    drain(store, queue)
    assert execute(store, queue.init_policy("fair", {"level_s": 30.0}, 3)) is True
    assert execute(store, queue.init_policy("fifo", {}, 4)) is False
    assert switch_policy(store, queue, build_policy("fifo"), 4).moved == 0
    assert execute(store, queue.active_policy()).revision == 4


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_come_or_leave_while_a_switch_reads_hide_no_other_from_it(
    store: redis.Redis, queue: FleetQueue, seed: int
) -> None:
    rng, early, late = Random(seed), 100, 160
    enqueue(store, queue, range(early, late))
    waited = {entry_of(number).id for number in range(early, late)}
    build = switch._Build(store, queue, build_policy("fair"), "token")
    assert build.begin(1)
    nothing, read = build._place(()), set[str]()
    rows, position, known = build._step(nothing, "scan", -1, limit=7)
    while True:
        read |= {id_.decode() for id_, _ in rows}
        if not position:
            break
        for action in rng.choices(["early", "early", "late", "claim"], k=rng.randrange(8)):
            if action == "early":
                early -= 1
                enqueue(store, queue, range(early, early + 1))
            elif action == "late":
                enqueue(store, queue, range(late, late + 1))
                late += 1
            else:
                claimed = execute(store, queue.claim("gpu", max_requests=1, max_tokens=10**9, lease_s=60))
                waited -= {request.id for request in claimed.requests}
        rows, position, known = build._step(nothing, "scan", position, limit=7, known=known)
    assert waited <= read


def test_a_slow_server_is_given_smaller_steps_so_that_claims_come_between_them(
    store: redis.Redis, queue: FleetQueue
) -> None:
    def count_steps(revision: int, step_s: float) -> int:
        now_s = 0.0

        def clock() -> float:
            nonlocal now_s
            now_s += step_s
            return now_s

        before = int(store.info("commandstats")["cmdstat_evalsha"]["calls"])
        assert switch_policy(store, queue, build_policy("priority"), revision, clock).moved == 3000
        return int(store.info("commandstats")["cmdstat_evalsha"]["calls"]) - before

    enqueue(store, queue, range(3000))
    quick, slow = count_steps(1, 0.001), count_steps(2, 1.0)
    assert quick < 3000 / switch.CHUNK + 10
    assert slow > 2 * 3000 / switch.CHUNK + 10
    assert Counter(drain(store, queue)) == Counter(entry_of(number).id for number in range(3000))
