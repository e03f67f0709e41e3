"""A run as an engine records it: requests served step by step, written to the database a row a second."""

import random
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from functools import reduce
from typing import NamedTuple

from inference.models import BatchRecord, RequestRecord
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.simulation.outcome import Outcome
from scheduling.core.simulation.replica import EOS, SimulatedReplica, SimulatedSequence
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import StepCost, StepFeatures, measure_parts

START = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)


BETWEEN_S = 0.0005
"""What passes between two steps."""


class Step(NamedTuple):
    """What is counted of one."""

    seconds: float
    size: int
    features: StepFeatures
    tokens: int


def record_run(
    requests: list[TraceRequest],
    cost: StepCost,
    *,
    tells_features: bool = True,
    pace: Callable[[float], float] = lambda now_s: 1.0,
) -> None:
    """Serve requests step by step and record them as an engine does, a row a second; costs vary by 5 %.

    `pace`: by what factor a step at a time (unix seconds) is slowed down.
    """
    draw, clock = random.Random(5), START.timestamp()
    start_s = clock
    planner = StepPlanner(
        "continuous", 8, 256, BlockAllocator(400, 16), 4000, lambda: clock, eos_token_ids=frozenset({EOS})
    )
    replica = SimulatedReplica(planner, cost, fast_forward=False)
    pending, outcomes = [Outcome(request) for request in requests], list[Outcome]()
    seconds: dict[int, list[Step]] = defaultdict(list)
    while pending or planner.sequences:
        while pending and start_s + pending[0].request.arrival_s <= clock and planner.room().requests:
            outcome = pending.pop(0)
            outcome.claimed_s = clock
            replica.add(SimulatedSequence(str(len(outcomes)), 1, outcome))
            outcomes.append(outcome)
        if not replica.plan(clock):
            clock = start_s + pending[0].request.arrival_s
            continue
        replica.start(clock, 0.0, 0.0)
        features, num_parts = measure_parts(replica._parts), len(replica._parts)
        step_s = cost.price(features) * pace(clock) * draw.uniform(0.95, 1.05)
        clock += step_s + BETWEEN_S
        tokens = replica.tokens
        outputs = replica.end_step()
        for output in outputs:
            outcome = output.sequence.outcome  # type: ignore[attr-defined]
            outcome.first_token_s = outcome.first_token_s or clock
            outcome.finished_s = clock
        seconds[int(clock)].append(Step(step_s, num_parts, features, replica.tokens - tokens))
    for second, steps in seconds.items():
        _write_second(second, steps, tells_features)
    _write_requests(outcomes, start_s)


def _write_second(second: int, steps: list[Step], tells_features: bool) -> None:
    total = reduce(StepFeatures.plus, (step.features for step in steps))
    busy_s = sum(step.seconds + BETWEEN_S for step in steps)
    told: dict[str, float] = {"busy_ms": 1000 * busy_s, **total._asdict()} if tells_features else {}
    BatchRecord.objects.create(
        replica="gpu-0",
        model="demo",
        second=datetime.fromtimestamp(second, UTC),
        batch_size_mean=sum(step.size for step in steps) / len(steps),
        batch_size_max=8,
        prompt_tokens=total.prefill_tokens,
        output_tokens=sum(step.tokens for step in steps),
        step_ms_mean=1000 * sum(step.seconds for step in steps) / len(steps),
        step_ms_max=1000 * max(step.seconds for step in steps),
        kv_blocks_used=0,
        kv_blocks_total=400,
        preemptions=0,
        mode="continuous",
        policy="fifo",
        **{**told, "steps": len(steps)},
    )


def _write_requests(outcomes: list[Outcome], start_s: float) -> None:
    for number, outcome in enumerate(outcomes):
        request = outcome.request
        RequestRecord.objects.create(
            request_id=str(number),
            model="demo",
            tenant=request.tenant,
            priority=3,
            endpoint="completions",
            state="finished",
            finish_reason="length",
            arrived_at=datetime.fromtimestamp(start_s + request.arrival_s, UTC),
            claimed_at=datetime.fromtimestamp(outcome.claimed_s or 0, UTC),
            first_token_at=datetime.fromtimestamp(outcome.first_token_s or 0, UTC),
            finished_at=datetime.fromtimestamp(outcome.finished_s or 0, UTC),
            prompt_tokens=request.prompt_tokens,
            completion_tokens=request.output_tokens,
            max_tokens=request.max_tokens,
            replica="gpu-0",
            policy="fifo",
        )
