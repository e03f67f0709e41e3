"""The sizer: what a strategy sees of an engine, and that the engine follows it, within what memory allows."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from inference.messages import DeploymentSpec, InferenceRequest, LatencyTarget, Telemetry
from inference.worker.active import ActiveRequest, open_request
from inference.worker.costs import MIN_OBSERVATIONS, StepCosts
from inference.worker.meters import Meters, Second
from inference.worker.sizer import Sizer
from scheduling.core.answers import ClaimedRequest
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import SamplingParams
from scheduling.core.sizing.cost_model import StepFeatures
from scheduling.core.sizing.observer import LATENCY_KEEP_S, PERIOD_S
from scheduling.core.sizing.strategies import InvalidSizingParameter, UnknownSizing
from tests.sequences import SilentStream


class Bench:
    """A sizer whose clock, queue and memory the test moves."""

    def __init__(self, sizing: str = "fixed", limit: int | None = None, **params: float) -> None:
        self.now_s = 1000.0
        self.waiting = 0
        self.limit = limit
        self.planner = StepPlanner("continuous", 16, 512, BlockAllocator(1000, 16), 1000, lambda: self.now_s)
        self.meters = Meters(Second(started_s=self.now_s))
        self.costs = StepCosts(block_bytes=16 * 1000, block_size=16, swap_bytes_per_s=1e9)
        self.sizer = Sizer(
            self.planner,
            self.meters,
            self.costs,
            deployment=DeploymentSpec(
                name="m", path="/m", sizing=sizing, sizing_params=params, targets=[LatencyTarget("", 3, 1.0, 4.0, 0.5)]
            ),
            num_waiting=lambda: self.waiting,
            telemetry=lambda: None,
            memory_limit=self.read_limit,
            clock=lambda: self.now_s,
        )

    def read_limit(self, telemetry: Telemetry | None) -> int | None:
        return self.limit

    def tick(self) -> int:
        self.now_s += PERIOD_S
        self.sizer.tick()
        return self.planner.max_batch_size

    def end(self, ttft_s: float, e2e_s: float, **fields: Any) -> None:
        """A request ends now that was claimed at once when it arrived."""
        active = make_active(self.now_s - e2e_s, **fields)
        active.first_token_s = self.now_s - e2e_s + ttft_s
        self.sizer.count_end(active, self.now_s)


def make_active(arrival_s: float, **fields: Any) -> ActiveRequest:
    request = InferenceRequest(
        id="r", model="m", tenant="t", priority=3, arrival_s=arrival_s, prompt_token_ids=[1], max_tokens=9,
        sampling=SamplingParams(), **fields,
    )  # fmt: skip
    new_stream: Callable[[SamplingParams], Any] = lambda sampling: SilentStream()  # noqa: E731
    claimed = ClaimedRequest("r", msgspec.msgpack.encode(request), 1, [])
    return open_request(claimed, owner="o", model="m", new_stream=new_stream, now_s=arrival_s)


def test_latency_first_shrinks_while_the_p99_is_over_its_target_and_says_so() -> None:
    bench = Bench("latency_first")
    assert bench.planner.max_batch_size == 16
    bench.end(ttft_s=2.5, e2e_s=3.0)
    assert bench.tick() == 12
    assert bench.tick() == 12, "latencies under an earlier size say nothing of this one"
    bench.end(ttft_s=0.1, e2e_s=9.0)
    assert bench.tick() == 9
    assert [change.batch_size for change in bench.sizer.changes] == [12, 9]
    assert bench.sizer.changes[0].reason == "latency_first: p99 is 250% of its target"
    assert bench.meters.second.size_changes == list(bench.sizer.changes)


def test_a_deadline_of_the_request_stands_before_the_target() -> None:
    bench = Bench("latency_first")
    bench.end(ttft_s=0.5, e2e_s=3.0, deadline_s=bench.now_s - 2.0)
    assert bench.tick() == 12


def test_the_time_between_tokens_is_held_against_its_target() -> None:
    bench = Bench("latency_first")
    active = make_active(bench.now_s - 3.5)
    active.first_token_s = bench.now_s - 3.0
    active.sequence.tokens += [5, 5, 5, 5]
    bench.sizer.count_end(active, bench.now_s)
    assert bench.tick() == 12
    assert bench.sizer.changes[-1].reason == "latency_first: p99 is 200% of its target"


def test_latencies_of_half_a_minute_ago_are_forgotten() -> None:
    bench = Bench("latency_first")
    bench.end(ttft_s=2.5, e2e_s=3.0)
    bench.now_s += LATENCY_KEEP_S + 1
    assert bench.tick() == 16


def test_a_strategy_grows_when_the_batch_is_full_and_requests_wait_in_the_fleet() -> None:
    bench = Bench("balanced", initial=1)
    assert bench.tick() == 1
    bench.waiting = 5
    assert bench.tick() == 1, "the batch is not full"
    bench.planner.add(make_active(0.0).sequence)
    bench.planner.plan(bench.now_s)
    assert bench.tick() == 2


def test_no_size_is_chosen_that_memory_forbids() -> None:
    for sizing in ("fixed", "throughput_first", "adaptive", "latency_first"):
        bench = Bench(sizing, limit=3)
        assert bench.planner.max_batch_size == 3
        assert bench.tick() <= 3
        bench.sizer.switch("balanced", {"initial": 50})
        assert bench.tick() == 3
        assert bench.sizer.changes[-1].reason.endswith("memory allows 3")


def test_a_fixed_size_gives_way_when_memory_shrinks_and_comes_back() -> None:
    bench = Bench()
    bench.limit = 9
    assert bench.tick() == 9
    assert bench.sizer.changes[-1].reason == "memory allows 9"
    bench.limit = 10
    assert bench.tick() == 9, "a reading that wavers moves nothing"
    bench.limit = None
    assert bench.tick() == 9, "what is not known now has not changed"
    bench.limit = 400
    assert bench.tick() == 16
    assert (bench.sizer.name, len(bench.sizer.changes)) == ("fixed", 2)


def test_a_switch_holds_at_once_and_begins_with_the_present_size() -> None:
    bench = Bench()
    bench.sizer.switch("memory_efficient", {"largest": 64})
    assert (bench.sizer.name, bench.planner.max_batch_size, bench.sizer.params["initial"]) == (
        "memory_efficient",
        16,
        16,
    )
    bench.sizer.switch("throughput_first", {"initial": 7})
    assert bench.planner.max_batch_size == 7
    bench.sizer.switch("latency_first", {"largest": 4})
    assert bench.planner.max_batch_size == 4
    bench.sizer.set_batch_size(9)
    assert (bench.sizer.name, bench.planner.max_batch_size) == ("fixed", 9)


@pytest.mark.parametrize("sizing", ["fixed", "throughput_first"])
def test_a_switch_to_fixed_while_memory_is_short_comes_back_to_the_size_that_was_set(sizing: str) -> None:
    bench = Bench(sizing, limit=3, initial=12)
    assert bench.tick() == 3
    bench.sizer.switch("fixed", {})
    assert bench.tick() == 3
    bench.limit = 400
    assert bench.tick() == 12


def test_a_switch_to_nonsense_changes_nothing() -> None:
    bench = Bench("balanced")
    with pytest.raises(UnknownSizing):
        bench.sizer.switch("huge", {})
    with pytest.raises(InvalidSizingParameter):
        bench.sizer.switch("fixed", {"initial": "many"})
    assert (bench.sizer.name, bench.planner.max_batch_size) == ("balanced", 16)


def test_the_size_of_fixed_is_moved_by_nobody() -> None:
    bench = Bench()
    bench.waiting = 100
    bench.end(ttft_s=50.0, e2e_s=60.0)
    assert bench.tick() == 16
    assert not bench.sizer.changes


def test_swapping_pays_where_computing_takes_longer_than_the_way_there_and_back() -> None:
    bench = Bench()
    assert not bench.costs.swap_pays(500), "nothing is known yet"
    for number in range(16 * MIN_OBSERVATIONS):
        prefill = 0 if number % 2 else 100 + number
        bench.costs.note(StepFeatures(1, prefill, 1, 50, prefill * prefill // 2), 0.001 + 1e-4 * prefill)
    assert bench.costs.swap_pays(500)
    assert not StepCosts(block_bytes=16_000, block_size=16).swap_pays(500), "there is no way"
    slow = StepCosts(block_bytes=16_000, block_size=16, swap_bytes_per_s=1e6)
    for _ in range(MIN_OBSERVATIONS):
        slow.note(StepFeatures(1, 100, 0, 0, 5000), 0.011)
    assert not slow.swap_pays(500)


def test_steps_whose_time_is_all_put_down_to_their_context_tell_no_price() -> None:
    costs = StepCosts()
    for number in range(40 * MIN_OBSERVATIONS):
        costs.note(StepFeatures(1, 0, 1, 100 + number, 0), 1e-6 * (20 + number))
    assert costs.cost is None
