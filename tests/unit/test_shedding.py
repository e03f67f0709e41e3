"""A full queue drops the request with the least right, and only for one with more."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.policies import POLICIES, Policy, build_policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.core.rules import MAX_EXPIRED, MAX_SHED

CLAIMS = st.integers(0, 5).map(lambda chance: chance == 5)
"""Few, or the queue would hardly ever be full."""
ARRIVALS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50), CLAIMS), min_size=1, max_size=60)


def entry_of(number: int, priority: int, tokens: int) -> QueueEntry:
    return QueueEntry(
        id=f"r{number:03d}",
        tenant=f"t{number % 3}",
        priority=priority,
        arrival_s=float(number),
        prompt_tokens=tokens,
        max_tokens=1,
    )


@given(
    arrivals=ARRIVALS,
    policy=st.sampled_from(sorted(POLICIES)).map(build_policy),
    depth_limit=st.integers(1, 8),
    tokens_limit=st.none() | st.integers(20, 200),
)
def test_the_lowest_and_latest_go_for_higher_ones_and_nobody_is_lost(
    arrivals: list[tuple[int, int, bool]], policy: Policy, depth_limit: int, tokens_limit: int | None
) -> None:
    queue = FlowQueue(clock=lambda: 0.0)
    queue.init_policy(policy.name, policy.params, 1)
    fresh: dict[str, QueueEntry] = {}
    claimed, refused, shed_ids = 0, 0, set[str]()
    for number, (priority, tokens, claim) in enumerate(arrivals):
        entry = entry_of(number, priority, tokens)
        answer = queue.enqueue(
            entry,
            policy.place(entry),
            revision=1,
            depth_limit=depth_limit,
            tokens_limit=tokens_limit,
            shed=True,
        )
        by_right = sorted(fresh.values(), key=lambda e: (e.priority, e.arrival_s), reverse=True)
        assert [shed.id for shed in answer.shed] == [e.id for e in by_right[: len(answer.shed)]]
        assert all(fresh.pop(shed.id).priority > priority for shed in answer.shed)
        shed_ids |= {shed.id for shed in answer.shed}
        if answer.status == "full":
            refused += 1
            assert tokens_limit is not None or all(e.priority <= priority for e in fresh.values())
        else:
            fresh[entry.id] = entry
        snapshot = queue.snapshot()
        assert snapshot.depth == len(fresh) == answer.depth <= depth_limit
        assert tokens_limit is None or snapshot.waiting_tokens <= tokens_limit or snapshot.depth == 1
        if claim:
            for request in queue.claim("gpu", max_requests=1, max_tokens=10**6, lease_s=1e9).requests:
                del fresh[request.id]
                claimed += 1
    assert claimed + refused + len(shed_ids) + len(fresh) == len(arrivals)
    assert queue.snapshot().shed_total == len(shed_ids)


def put(queue: FlowQueue, number: int, priority: int, **limits: int) -> tuple[str, list[str]]:
    entry = entry_of(number, priority, 9)
    answer = queue.enqueue(
        entry,
        build_policy("fifo").place(entry),
        revision=0,
        depth_limit=limits.get("depth_limit", 99),
        tokens_limit=limits.get("tokens_limit"),
        shed=True,
    )
    return answer.status, [shed.id for shed in answer.shed]


def test_equals_are_not_dropped_for_each_other() -> None:
    queue = FlowQueue()
    assert put(queue, 0, 3, depth_limit=1) == ("queued", [])
    assert put(queue, 1, 3, depth_limit=1) == ("full", [])
    assert put(queue, 2, 2, depth_limit=1) == ("queued", ["r000"])


def test_of_the_lowest_the_latest_goes_first() -> None:
    queue = FlowQueue()
    for number, priority in enumerate([5, 5, 4]):
        put(queue, number, priority)
    dropped = [put(queue, number, 0, depth_limit=3)[1] for number in (3, 4, 5)]
    assert dropped == [["r001"], ["r000"], ["r002"]]


def test_what_was_claimed_once_is_never_dropped() -> None:
    queue = FlowQueue()
    put(queue, 0, 5)
    queue.claim("gpu", max_requests=1, max_tokens=99, lease_s=5)
    queue.release("gpu")
    assert put(queue, 1, 0, depth_limit=1) == ("full", [])


def test_one_newcomer_drops_only_so_many_and_none_where_that_does_not_suffice() -> None:
    queue = FlowQueue()
    for number in range(40):
        put(queue, number, 5)
    tokens = 10 * 40
    assert put(queue, 50, 0, tokens_limit=tokens + 10 - 10 * MAX_SHED - 1) == ("full", [])
    assert queue.snapshot().depth == 40
    status, shed = put(queue, 51, 0, tokens_limit=tokens + 10 - 10 * MAX_SHED)
    assert (status, len(shed)) == ("queued", MAX_SHED)


def test_a_request_longer_than_the_bound_comes_in_when_nothing_else_waits() -> None:
    queue = FlowQueue()
    assert put(queue, 0, 3, tokens_limit=5) == ("queued", [])
    assert put(queue, 1, 3, tokens_limit=5) == ("full", [])


def test_a_shed_request_is_ended_by_one_caller_and_its_record_says_so() -> None:
    queue = FlowQueue(clock=lambda: 7.0)
    put(queue, 0, 5)
    assert put(queue, 1, 0, depth_limit=1) == ("queued", ["r000"])
    assert queue.shed_before(6.9) == []
    assert queue.shed_before(7.0) == ["r000"]
    assert [queue.end_shed("r000", b"end"), queue.end_shed("r000", b"end")] == [True, False]
    record = queue.record("r000")
    assert record is not None
    assert (record.state, record.finish) == ("failed", b"end")
    assert queue.shed_before(8.0) == []


def test_what_was_claimed_once_is_not_dropped_for_its_deadline() -> None:
    queue = FlowQueue(clock=lambda: 0.0)
    entry = dataclasses.replace(entry_of(0, 3, 9), deadline_s=5.0, drop_expired=True)
    queue.enqueue(entry, build_policy("fifo").place(entry), revision=0, depth_limit=9)
    queue.claim("gpu", max_requests=1, max_tokens=99, lease_s=5, now=1.0)
    queue.release("gpu")
    again = queue.claim("gpu", max_requests=1, max_tokens=99, lease_s=5, now=6.0)
    assert ([request.id for request in again.requests], again.dropped) == (["r000"], ())


def test_a_mass_of_expired_requests_is_dropped_a_bounded_number_at_a_time_and_none_is_served_meanwhile() -> None:
    queue = FlowQueue(clock=lambda: 0.0)
    for number in range(MAX_EXPIRED + 3):
        entry = dataclasses.replace(entry_of(number, 3, 9), deadline_s=5.0, drop_expired=True)
        queue.enqueue(entry, build_policy("fifo").place(entry), revision=0, depth_limit=999)
    put(queue, 999, 3, depth_limit=999)
    first, second = (queue.claim("gpu", max_requests=9, max_tokens=999, lease_s=5, now=6.0) for _ in range(2))
    assert (len(first.dropped), first.requests, first.more) == (MAX_EXPIRED, [], True)
    assert (len(second.dropped), [request.id for request in second.requests], second.more) == (3, ["r999"], False)
    record = queue.record(first.dropped[0].id)
    assert record is not None
    assert (record.state, record.dropped) == ("failed", "deadline_exceeded")
    assert len(queue.shed_before(1e9, limit=1000)) == MAX_EXPIRED + 3
