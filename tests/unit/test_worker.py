"""The worker's parts that need no model and no Redis: the gate, the meters, commands, what an outbox joins."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.messages import LATENCY_BUCKETS_S, DeploymentSpec, Finish, InferenceRequest
from inference.worker.active import ActiveRequest, open_request
from inference.worker.commands import CommandRefusedError, Controls
from inference.worker.costs import StepCosts
from inference.worker.gate import Gate
from inference.worker.inbox import Cancelled, Inbox, Lost
from inference.worker.meters import Latencies, Meters, Second
from inference.worker.outbox import Handover, Output, merge
from inference.worker.sizer import Sizer
from inference.worker.spec import ControlMessage
from inference.worker.telemetry import HostSource
from scheduling.core.answers import ClaimedRequest
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import SamplingParams


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Upper:
    """A text stream whose token 65 is the text A."""

    stopped = False

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return "."


def make_active(name: str = "r", journal: list[int] | None = None) -> ActiveRequest:
    request = InferenceRequest(
        id=name,
        model="m",
        tenant="t",
        priority=3,
        arrival_s=10.0,
        prompt_token_ids=[1, 2],
        max_tokens=9,
        sampling=SamplingParams(),
    )
    claimed = ClaimedRequest(name, msgspec.msgpack.encode(request), 2, journal or [])
    new_stream: Callable[[SamplingParams], Any] = lambda sampling: Upper()  # noqa: E731
    return open_request(claimed, owner="o", model="m", new_stream=new_stream, now_s=11.0)


def make_sizer(planner: StepPlanner) -> Sizer:
    return Sizer(
        planner,
        Meters(Second(started_s=0.0)),
        StepCosts(),
        deployment=DeploymentSpec(name="m", path="/m", max_batch_size=planner.batch_size),
        num_waiting=lambda: 0,
        telemetry=lambda: None,
        memory_limit=lambda telemetry: None,
    )


def test_a_gate_finishes_what_runs_and_then_is_stopped() -> None:
    clock = Clock()
    gate = Gate(clock)
    assert gate.is_open
    gate.drain(5.0)
    assert (gate.is_open, gate.time_is_up) == (False, False)
    clock.now_s += 5
    assert gate.time_is_up
    gate.emptied(is_delivered=False)
    assert gate.state == "draining"
    gate.emptied(is_delivered=True)
    assert (gate.state, gate.is_over, gate.must_leave) == ("stopped", False, False)
    gate.resume()
    assert gate.is_open


def test_a_gate_that_was_told_to_end_stays_closed() -> None:
    gate = Gate(Clock())
    gate.end(5.0)
    gate.resume()
    gate.pause()
    assert gate.state == "draining"
    gate.end(0.0)
    assert gate.must_leave
    gate.emptied(is_delivered=False)
    assert gate.is_over


def test_a_resumed_request_has_its_tokens_and_text_back() -> None:
    active = make_active(journal=[72, 105])
    assert active.sequence.tokens == [1, 2, 72, 105]
    assert active.output == "Hi"
    active.sequence.tokens.append(33)
    assert active.push(33, 12.0) == "!"
    finish = active.finish("length")
    assert (finish.completion_tokens, finish.text, active.output) == (3, ".", "Hi!.")
    event = active.event(finish, now_s=13.0, replica="g", policy="fifo", revision=1)
    assert (event.attempts, event.first_token_s, event.claimed_s) == (2, None, 11.0)


def test_steps_that_wait_for_redis_become_one_with_each_requests_tokens_in_order() -> None:
    a, b = make_active("a"), make_active("b")
    waiting = Handover("o", [Output(a, 0, [65], ["A"], journals=False)])
    merge(waiting, Handover("o", [Output(a, 1, [66], ["B"]), Output(b, 0, [67], ["C"])]))
    merge(waiting, Handover("o", [Output(a, 2, [68], ["D"], Finish("length", 2, 3))], releases={"b": 1}))
    joined = [(o.active.request.id, o.start, o.token_ids, o.texts, o.journals) for o in waiting.outputs]
    assert joined == [("a", 0, [65], ["A"], False), ("a", 1, [66, 68], ["B", "D"], True), ("b", 0, [67], ["C"], True)]
    assert waiting.outputs[1].finish is not None
    assert waiting.releases == {"b": 1}


def test_latencies_fall_into_the_bucket_that_holds_them() -> None:
    latencies = Latencies()
    for seconds in (0.0005, 0.001, 0.0011, 1000.0, -1.0):
        latencies.observe(seconds)
    histogram = latencies.read()
    assert histogram.counts[:2] == [3, 1]
    assert histogram.counts[-1] == 1
    assert len(histogram.counts) == len(LATENCY_BUCKETS_S) + 1
    assert histogram.sum_s == pytest.approx(1000.0026)


FIXED: dict[str, Any] = {
    "replica": "g",
    "model": "m",
    "mode": "continuous",
    "kv_blocks_used": 3,
    "kv_blocks_total": 9,
    "preemptions": 2,
    "policy": "fifo",
    "policy_revision": 1,
}
"""What is told with a second and not counted."""


def test_a_second_is_recorded_once_it_is_over_and_only_where_something_ran() -> None:
    meters = Meters(Second(started_s=50.0))
    meters.count_step(batch_size=4, prompt_tokens=10, output_tokens=3, seconds=0.01)
    meters.count_step(batch_size=2, prompt_tokens=0, output_tokens=2, seconds=0.03)
    assert meters.close_second(50.9, **FIXED) is None
    event = meters.close_second(51.0, **FIXED)
    assert event is not None
    assert (event.second_s, event.steps, event.batch_size_mean, event.batch_size_max) == (50, 2, 3.0, 4)
    assert (event.prompt_tokens, event.output_tokens, event.preemptions) == (10, 5, 2)
    assert (event.step_ms_mean, event.step_ms_max) == pytest.approx((20.0, 30.0))
    assert meters.tokens_per_s == pytest.approx(5.0)
    assert meters.close_second(52.1, **FIXED) is None
    assert meters.tokens_per_s == 0


@given(st.lists(st.floats(0.01, 3.0), min_size=1, max_size=40), st.floats(0, 10))
def test_a_record_is_of_the_clock_s_second_whenever_the_loop_looks(pauses: list[float], now_s: float) -> None:
    meters = Meters(Second(started_s=now_s))
    told, num_steps = list[int](), 0
    for pause_s in pauses:
        meters.count_step(batch_size=1, prompt_tokens=0, output_tokens=1, seconds=0.01)
        now_s += pause_s
        started_s = meters.second.started_s
        event = meters.close_second(now_s, **FIXED)
        if event is None:
            continue
        told.append(event.second_s)
        num_steps += event.steps
        assert abs(event.second_s - started_s) <= 0.5
        assert now_s >= event.second_s + 1
    assert told == sorted(set(told)), "a second is told twice"
    assert num_steps + meters.second.steps == len(pauses)


def test_the_inbox_wakes_a_waiting_loop_and_keeps_the_order() -> None:
    inbox = Inbox()
    inbox.wake()
    started = time.monotonic()
    assert inbox.read(600.0) == []
    assert time.monotonic() - started < 300, "it waited although it was woken"
    inbox.put(Cancelled(["a"]))
    inbox.put(Lost({"b": 1}))
    assert inbox.read() == [Cancelled(["a"]), Lost({"b": 1})]
    assert inbox.read() == []


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("set_mode", {"mode": "warp"}),
        ("set_mode", {}),
        ("set_batch_size", {"max_batch_size": 0}),
        ("set_batch_size", {"max_batch_size": True}),
        ("set_batch_size", {"max_batch_size": "8"}),
        ("drain", {"drain_s": -1}),
        ("policy", {"revision": "new"}),
        ("sizing", {}),
        ("sizing", {"name": "largest"}),
        ("sizing", {"name": "fixed", "params": [8]}),
        ("sizing", {"name": "fixed", "params": {"initial": 0}}),
        ("sizing", {"name": "latency_first", "params": {"smallest": 9, "largest": 8}}),
        ("deployment", {"name": "m"}),
        ("deployment", {"name": "m", "path": "/m", "triggers": {"sometimes": 1}}),
        ("deployment", {"name": "m", "path": "/m", "sizing": "largest", "mode": "static"}),
        ("deployment", {"name": "m", "path": "/m", "max_batch_size": 0, "mode": "static"}),
    ],
)
def test_a_command_with_unusable_arguments_is_refused_and_changes_nothing(
    command: Any, arguments: dict[str, Any]
) -> None:
    clock = Clock()
    gate = Gate(clock)
    planner = StepPlanner("continuous", 8, 64, BlockAllocator(8, 16), 128, clock)
    sizer = make_sizer(planner)
    deployment = DeploymentSpec(name="m", path="/m", max_batch_size=8)
    controls = Controls(gate, planner, sizer, lambda name, revision: None, deployment=deployment, drain_s=5.0)
    with pytest.raises(CommandRefusedError):
        controls.obey(ControlMessage(id=1, command=command, arguments=arguments))
    assert (gate.state, planner.mode, planner.max_batch_size, sizer.name) == ("ready", "continuous", 8, "fixed")


def test_host_telemetry_says_that_it_is_the_hosts() -> None:
    reading = HostSource().read()
    assert reading.source == "host"
    assert reading.memory_used_bytes is not None
    assert reading.memory_total_bytes is not None
    assert 0 < reading.memory_used_bytes < reading.memory_total_bytes
