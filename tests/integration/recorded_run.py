"""A run as an engine records it: requests served step by step, written to the database a row a second."""

import random
from collections import defaultdict
from datetime import UTC, datetime

from inference.models import BatchRecord, RequestRecord
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.simulation.outcome import Outcome
from scheduling.core.simulation.replica import EOS, SimulatedReplica, SimulatedSequence
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import StepCost, measure_parts

START = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)


def record_run(requests: list[TraceRequest], cost: StepCost) -> None:
    """Serve requests step by step and record them as an engine does, a row a second; costs vary by 5 %."""
    draw, clock = random.Random(5), START.timestamp()
    start_s = clock
    planner = StepPlanner(
        "continuous", 8, 256, BlockAllocator(400, 16), 4000, lambda: clock, eos_token_ids=frozenset({EOS})
    )
    replica = SimulatedReplica(planner, cost, fast_forward=False)
    pending, outcomes = [Outcome(request) for request in requests], list[Outcome]()
    seconds: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)
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
        step_s = cost.price(features) * draw.uniform(0.95, 1.05)
        clock += step_s + 0.0005
        tokens = replica.tokens
        outputs = replica.end_step()
        for output in outputs:
            outcome = output.sequence.outcome  # type: ignore[attr-defined]
            outcome.first_token_s = outcome.first_token_s or clock
            outcome.finished_s = clock
        seconds[int(clock)].append((step_s, num_parts, features.prefill_tokens, replica.tokens - tokens))
    _write(seconds, outcomes, start_s)


def _write(seconds: dict[int, list[tuple[float, int, int, int]]], outcomes: list[Outcome], start_s: float) -> None:
    for second, steps in seconds.items():
        times, sizes, prompts, outputs = zip(*steps, strict=True)
        BatchRecord.objects.create(
            replica="gpu-0",
            model="demo",
            second=datetime.fromtimestamp(second, UTC),
            steps=len(steps),
            batch_size_mean=sum(sizes) / len(steps),
            batch_size_max=8,
            prompt_tokens=sum(prompts),
            output_tokens=sum(outputs),
            step_ms_mean=1000 * sum(times) / len(steps),
            step_ms_max=1000 * max(times),
            kv_blocks_used=0,
            kv_blocks_total=400,
            preemptions=0,
            mode="continuous",
            policy="fifo",
        )
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
