"""An engine without processes around it, which serves a trace by processor time: for machines that are busy."""

import random
import time
from collections import defaultdict
from dataclasses import astuple, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from inference.engine.runner import ModelRunner
from inference.worker.costs import StepCosts
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.policy import Policy
from scheduling.core.prefix import PrefixCache
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.core.room import URGENT_PERIOD_S
from scheduling.core.sequence import SamplingParams, Sequence, StepPart
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import NO_STEPS, StepCost, StepFeatures, measure_parts

if TYPE_CHECKING:
    from inference.models import BatchRecord, RequestRecord

OWNER = REPLICA = "local"
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class ProcessorClock:
    """Seconds of processor time, which what else runs touches little; waiting lets it jump."""

    def __init__(self) -> None:
        self._start_s = time.process_time()

    def now(self) -> float:
        """Since it was made."""
        return time.process_time() - self._start_s

    def wait_until(self, time_s: float) -> None:
        """Let that time come at once."""
        self._start_s -= max(0.0, time_s - self.now())


@dataclass(slots=True)
class _Second:
    features: StepFeatures = NO_STEPS
    busy_s: float = 0.0
    step_s: float = 0.0
    sequences: int = 0
    tokens: int = 0
    preemptions: int = 0
    cost: StepCost | None = None


@dataclass(slots=True)
class _Stay:
    claimed_s: float
    tokens_s: list[float] = field(default_factory=list)


class LocalEngine:
    """The engine's loop on the queue in memory: what is claimed between two steps joins the one after the next."""

    def __init__(self, runner: ModelRunner, *, slots: int, step_tokens: int, long_prefill_threshold: int) -> None:
        self.runner = runner
        self.slots = slots
        self.step_tokens = step_tokens
        self.long_prefill = long_prefill_threshold
        self.costs = StepCosts()
        """Learned over all runs, as an engine process does."""

    def serve(self, trace: list[TraceRequest], policy: Policy) -> "tuple[list[RequestRecord], list[BatchRecord]]":
        """Serve a trace; what an engine process would have recorded."""
        run = _Run(self, trace, policy)
        run.drive()
        return run.requests(), run.batches()


class _Run:
    def __init__(self, engine: LocalEngine, trace: list[TraceRequest], policy: Policy) -> None:
        runner = engine.runner
        self._runner, self._trace, self._policy, self._costs = runner, trace, policy, engine.costs
        self._clock = ProcessorClock()
        self._queue = FlowQueue(clock=self._clock.now)
        self._queue.init_policy(policy.name, policy.params, 1)
        allocator = BlockAllocator(runner.num_blocks, runner.block_size)
        self._planner = StepPlanner(
            "continuous", engine.slots, engine.step_tokens, allocator, runner.max_model_len, self._clock.now,
            prefix=PrefixCache(allocator, key=b""), long_prefill_threshold=engine.long_prefill,
        )  # fmt: skip
        self._looked_s = 0.0
        """When it claimed last, or tried to."""
        self._claimed: list[Sequence] = []
        self._stays: dict[str, _Stay] = {}
        self._seconds: dict[int, _Second] = defaultdict(_Second)
        self._num_arrived = self._num_preempted = 0

    def drive(self) -> None:
        """Until all have ended."""
        trace, planner, clock = self._trace, self._planner, self._clock
        began_s = clock.now()
        while self._num_arrived < len(trace) or self._claimed or planner.sequences or self._queue.snapshot().depth:
            self._take()
            parts = planner.plan(clock.now())
            if not parts:
                self._claim()
                if not self._claimed:
                    clock.wait_until(trace[self._num_arrived].arrival_s)
                    began_s = clock.now()
                continue
            self._claim()
            began_s = self._step(parts, began_s)

    def _step(self, parts: list[StepPart], began_s: float) -> float:
        """Compute what was planned; when the turn that began then is over, and the next begins."""
        features, started_s = measure_parts(parts), self._clock.now()
        results = self._runner.step(parts)
        step_s = self._clock.now() - started_s
        outputs = self._planner.apply(parts, results)
        now_s = self._clock.now()
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
            self._stays[output.sequence.id].tokens_s.append(now_s)
            if output.finish:
                used = len(output.sequence.tokens)
                self._queue.finish(
                    OWNER, output.sequence.id, 1, state="finished", used_tokens=used, finish=b"", output=""
                )
        self._claim()
        second = self._seconds[int(now_s)]
        second.features = second.features.plus(features)
        second.step_s += step_s
        second.sequences += len(parts)
        second.tokens += len(outputs)
        second.preemptions += self._planner.num_preemptions - self._num_preempted
        self._num_preempted = self._planner.num_preemptions
        self._costs.note(features, step_s)
        second.cost = self._costs.cost
        ended_s = self._clock.now()
        second.busy_s += ended_s - began_s
        return ended_s

    def _take(self) -> None:
        for sequence in self._claimed:
            self._planner.add(sequence)
        self._claimed.clear()

    def _claim(self) -> None:
        """Let arrive what has come, and claim for the room there is; urgent ones where there is none."""
        now_s = self._clock.now()
        while self._num_arrived < len(self._trace) and self._trace[self._num_arrived].arrival_s <= now_s:
            self._arrive(self._num_arrived)
            self._num_arrived += 1
        room, urgent = self._planner.room(), self._planner.urgent_room()
        free = room.requests - len(self._claimed)
        is_due = now_s >= self._looked_s + URGENT_PERIOD_S
        is_urgent = free <= 0 and urgent is not None and is_due and not self._claimed
        if free <= 0 and not is_urgent:
            return
        self._looked_s = now_s
        claimed = self._queue.claim(
            OWNER, max_requests=1 if is_urgent else free,
            max_tokens=urgent.tokens if is_urgent and urgent else room.tokens,
            lease_s=1e9, max_priority=urgent.max_priority if is_urgent and urgent else None,
        )  # fmt: skip
        for request in claimed.requests:
            self._stays[request.id] = _Stay(now_s)
            sequence = self._sequence(int(request.id))
            sequence.is_urgent = is_urgent
            self._claimed.append(sequence)

    def _arrive(self, number: int) -> None:
        request = self._trace[number]
        entry = QueueEntry(
            id=str(number), tenant=request.tenant, priority=request.priority, arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens, max_tokens=request.max_tokens,
        )  # fmt: skip
        self._queue.enqueue(entry, self._policy.place(entry), revision=1, depth_limit=10**9)

    def _sequence(self, number: int) -> Sequence:
        request, draw = self._trace[number], random.Random(number)
        prompt = [draw.randrange(3, self._runner.vocab_size) for _ in range(request.prompt_tokens)]
        return Sequence(
            id=str(number), attempt=1, tenant=request.tenant, priority=request.priority, arrival_s=request.arrival_s,
            tokens=prompt, num_prompt_tokens=len(prompt), max_tokens=request.max_tokens, sampling=GREEDY,
        )  # fmt: skip

    def requests(self) -> "list[RequestRecord]":
        """As the historian would write them."""
        from inference.models import RequestRecord

        return [
            RequestRecord(
                request_id=str(number), tenant=request.tenant, priority=request.priority, state="finished",
                arrived_at=_moment(request.arrival_s),
                claimed_at=_moment((stay := self._stays[str(number)]).claimed_s),
                first_token_at=_moment(stay.tokens_s[0]), finished_at=_moment(stay.tokens_s[-1]), replica=REPLICA,
                prompt_tokens=request.prompt_tokens, completion_tokens=len(stay.tokens_s),
                max_tokens=request.max_tokens,
            )
            for number, request in enumerate(self._trace)
        ]  # fmt: skip

    def batches(self) -> "list[BatchRecord]":
        """As the historian would write them."""
        from inference.models import BatchRecord

        return [
            BatchRecord(
                replica=REPLICA, second=_moment(second), steps=did.features.steps, output_tokens=did.tokens,
                prompt_tokens=did.features.prefill_tokens, batch_size_mean=did.sequences / did.features.steps,
                step_ms_mean=1000 * did.step_s / did.features.steps, busy_ms=1000 * did.busy_s,
                preemptions=did.preemptions, prefill_tokens=did.features.prefill_tokens,
                decode_sequences=did.features.decode_sequences, context_tokens=did.features.context_tokens,
                attention_pairs=did.features.attention_pairs, step_cost=list(astuple(did.cost)) if did.cost else [],
            )
            for second, did in sorted(self._seconds.items())
        ]  # fmt: skip


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(1_700_000_000 + seconds, UTC)
