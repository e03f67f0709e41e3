"""The queue in memory: what it promises beyond what the stateful test compares with Redis."""

from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.flows import ENTRY, Flows
from scheduling.core.policies import build_policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import Placement, QueueEntry


def entry_of(number: int, prompt_tokens: int = 10) -> QueueEntry:
    return QueueEntry(
        id=f"r{number}", tenant="ada", priority=3, arrival_s=number, prompt_tokens=prompt_tokens, max_tokens=10
    )


def put(queue: FlowQueue, entry: QueueEntry, depth_limit: int = 100) -> str:
    place = build_policy("fifo").place(entry)
    return queue.enqueue(entry, place, revision=0, depth_limit=depth_limit).status


def test_a_queue_nobody_touched_is_fifo_at_revision_0() -> None:
    active = FlowQueue().active_policy()
    assert (active.revision, active.name, active.params) == (0, "fifo", {})


def test_a_claim_stops_at_the_first_request_that_does_not_fit_and_bypasses_it_never() -> None:
    queue = FlowQueue()
    for number, prompt_tokens in enumerate([10, 100, 10]):
        put(queue, entry_of(number, prompt_tokens))
    claimed = queue.claim("gpu", max_requests=10, max_tokens=50, lease_s=5)
    assert [request.id for request in claimed.requests] == ["r0"]
    assert claimed.depth == 2


def test_a_request_needs_room_for_its_journal_too_when_it_is_claimed_again() -> None:
    queue = FlowQueue()
    put(queue, entry_of(0))
    queue.claim("gpu", max_requests=1, max_tokens=10, lease_s=5)
    queue.journal("gpu", [("r0", 1, 0, b"\1\0\0\0" * 3)])
    queue.release("gpu")
    assert queue.claim("gpu", max_requests=1, max_tokens=12, lease_s=5).requests == []
    again = queue.claim("gpu", max_requests=1, max_tokens=13, lease_s=5).requests[0]
    assert (again.attempt, again.tokens) == (2, [1, 1, 1])


def test_a_record_is_forgotten_keep_s_after_its_end() -> None:
    now = [0.0]
    queue = FlowQueue(clock=lambda: now[0])
    put(queue, entry_of(0))
    queue.cancel("r0")
    now[0] = 59.9
    assert queue.record("r0") is not None
    now[0] = 60.0
    assert queue.record("r0") is None
    assert put(queue, entry_of(0)) == "queued"


def test_a_request_cancelled_while_running_is_told_to_its_next_owner_too() -> None:
    queue = FlowQueue(clock=lambda: 0.0)
    put(queue, entry_of(0))
    queue.claim("gpu-0", max_requests=1, max_tokens=100, lease_s=5)
    assert queue.cancel("r0").owner == "gpu-0"
    assert queue.expire(10.0) == [("gpu-0", 1)]
    queue.claim("gpu-1", max_requests=1, max_tokens=100, lease_s=5)
    assert queue.take_cancels("gpu-1") == ["r0"]


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.sampled_from(["put", "take", "remove", "correct"])),
        max_size=60,
    )
)
def test_flows_conserve_requests_and_virtual_time_never_goes_back(steps: list[tuple[str, int, str]]) -> None:
    flows, waiting, vt = Flows(), set[str](), 0.0

    def take(cost: float) -> str | None:
        if (head := flows.head()) is None:
            return None
        _, chunk, at = head
        id_: str = chunk.columns[ENTRY][at].id
        flows.take(head, cost)
        return id_

    for number, (flow, cost, action) in enumerate(steps):
        if action == "put":
            placement = Placement(flow=flow, weight=1 + cost % 3, rank=-cost)
            flows.place(entry_of(number), b"", number, placement)
            waiting.add(f"r{number}")
        elif action == "remove" and waiting:
            gone = sorted(waiting)[cost % len(waiting)]
            assert flows.remove(gone)
            waiting.remove(gone)
        elif action == "correct":
            flows.correct(flow, -cost / 2)
        elif (served := take(cost)) is not None:
            waiting.remove(served)
        assert len(flows.at) == len(waiting)
        assert flows.vt >= vt
        vt = flows.vt
    while (served := take(1)) is not None:
        waiting.remove(served)
    assert not waiting


def test_a_flow_that_comes_and_goes_unserved_leaves_nothing_behind() -> None:
    flows = Flows()
    flows.place(entry_of(0), b"", 0, Placement("first", 1.0, 0.0))
    for number in range(1, 1000):
        flows.place(entry_of(number), b"", number, Placement("fleeting", 1.0, 0.0))
        assert flows.remove(f"r{number}")
    assert len(flows._order) < 100


def test_drained_flows_that_the_system_caught_up_with_are_forgotten() -> None:
    flows = Flows()
    for number in range(2000):
        for name in (f"tenant-{number}", "steady"):
            flows.place(entry_of(number), b"", number, Placement(name, 1.0, 0.0))
            head = flows.head()
            assert head is not None
            flows.take(head, 10.0)
    assert len(flows._idle) < 200
    assert len(flows._spare) < 20
