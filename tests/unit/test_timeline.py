"""What a worker notes of a request is bounded, in order, and loses no token."""

from hypothesis import given
from hypothesis import strategies as st

from inference.messages import MAX_BURSTS, MAX_MARKS
from inference.worker.timeline import Timeline


@given(st.lists(st.floats(0, 3600), max_size=300))
def test_bursts_are_few_in_order_and_hold_every_token(times: list[float]) -> None:
    timeline = Timeline(1000.0)
    for time_s in sorted(times):
        timeline.count_token(1000 + time_s)
    bursts = timeline.bursts()
    assert len(bursts) <= MAX_BURSTS
    assert sum(num for _, num in bursts) == len(times)
    assert [ms for ms, _ in bursts] == sorted({ms for ms, _ in bursts})
    if times:
        assert bursts[0][0] <= round(1000 * min(times))
        assert bursts[-1][0] <= round(1000 * max(times))


def test_of_endless_turns_the_first_and_the_latest_are_kept() -> None:
    timeline = Timeline(10.0)
    for turn in range(100):
        timeline.mark("resumed" if turn % 2 else "preempted", 10.0 + turn, turn)
    assert len(timeline.marks) == MAX_MARKS
    assert (timeline.marks[0].ms, timeline.marks[-1].ms, timeline.marks[-1].tokens) == (0, 99_000, 99)


def test_a_clock_that_went_back_counts_as_the_arrival() -> None:
    timeline = Timeline(10.0)
    timeline.mark("started", 9.0, 0)
    timeline.count_token(9.5)
    assert timeline.marks[0].ms == 0
    assert timeline.bursts() == [(0, 1)]
