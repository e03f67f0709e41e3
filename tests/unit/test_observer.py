"""What a sizing strategy is shown: latencies from the claim, goodput from the arrival, counts of one period."""

import pytest

from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.simulation.outcome import ServiceTarget
from scheduling.core.sizing.controller import Observation
from scheduling.core.sizing.observer import Served, SizingObserver, Work
from tests.sequences import make_sequence

TARGET = ServiceTarget(ttft_s=1.0, e2e_s=10.0, tpot_s=0.5)


@pytest.fixture
def planner() -> StepPlanner:
    return StepPlanner("continuous", 4, 64, BlockAllocator(100, 4), 1000, lambda: 0.0)


def look(observer: SizingObserver, now_s: float, work: Work = Work(0, 0.0, 0)) -> Observation:  # noqa: B008
    return observer.observe(work, now_s, num_queued=3, memory_batch_limit=9, cost=None, telemetry=None)


@pytest.mark.parametrize(
    ("served", "ratio", "good"),
    [
        (Served(0.0, 0.2, 0.6, 2.0, 8), 0.4, 8),
        # It waited for 20 s, which no batch size mends; but its tokens came too late.
        (Served(0.0, 20.0, 20.5, 22.0, 8), 0.5, 0),
        (Served(0.0, 0.0, 3.0, 5.0, 8), 3.0, 0),
        (Served(0.0, 0.0, 0.5, 9.5, 10), 2.0, 0),
        (Served(0.0, 0.0, 0.5, 4.0, 8, deadline_s=2.0), 2.0, 0),
        (Served(0.0, 18.0, 18.5, 20.0, 8, deadline_s=40.0), 0.5, 0),
        (Served(0.0, 0.0, 3.0, 5.0, 8, is_resumed=True), 0.5714, 8),
    ],
    ids=["in time", "long in the queue", "late first token", "slow tokens", "own deadline", "deadline kept", "resumed"],
)
def test_a_size_is_judged_by_what_it_can_mend_and_rewarded_for_what_came_in_time(
    planner: StepPlanner, served: Served, ratio: float, good: int
) -> None:
    observer = SizingObserver(planner, Work(0, 0.0, 0), 0.0)
    observer.count_end(served, TARGET)
    seen = look(observer, served.ended_s + 0.25)
    assert seen.latency_ratio == pytest.approx(ratio, abs=1e-3)
    assert seen.good_tokens == good
    assert look(observer, served.ended_s + 0.5).good_tokens == 0, "of its period alone"


def test_without_a_target_every_token_is_good_and_nothing_is_late(planner: StepPlanner) -> None:
    observer = SizingObserver(planner, Work(0, 0.0, 0), 0.0)
    observer.count_end(Served(0.0, 90.0, 99.0, 999.0, 8), None)
    seen = look(observer, 1000.0)
    assert (seen.latency_ratio, seen.good_tokens) == (None, 8)


def test_a_period_is_summed_up_and_the_next_one_begins(planner: StepPlanner) -> None:
    for name in ("a", "b", "c", "d", "e"):
        planner.add(make_sequence(name, prompt=6))
    planner.plan(0.0)
    observer = SizingObserver(planner, Work(10, 1.0, 100), 0.0)
    seen = look(observer, 0.5, Work(14, 1.2, 130))
    assert (seen.steps, seen.tokens, seen.seconds) == (4, 30, 0.5)
    assert seen.step_s == pytest.approx(0.05)
    assert (seen.num_running, seen.num_waiting, seen.mean_context_tokens) == (4, 4, 6.0)
    assert (seen.kv_blocks_used, seen.kv_blocks_total, seen.memory_batch_limit) == (8, 100, 9)
    assert look(observer, 1.0, Work(14, 1.2, 130)).tokens == 0
