"""Sizing in a simulation: what each replica's controller sees of its engine, and what it decides."""

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from scheduling.core.simulation.outcome import Outcome, ServiceTarget, SizeChange
from scheduling.core.simulation.replica import SimulatedReplica
from scheduling.core.sizing.controller import Observation, Readings, Sizing
from scheduling.core.sizing.cost_model import StepCost

LATENCY_WINDOW = 256
"""How many of the latest requests of a replica a sizing controller judges by."""


@dataclass(slots=True)
class SizingWatch:
    """A replica's controller, and what it has seen, to tell one period from the next."""

    replica: SimulatedReplica
    sizing: Sizing
    cost: StepCost
    _steps: int = 0
    _busy_s: float = 0.0
    _tokens: int = 0
    _good_tokens: int = 0
    _preemptions: int = 0
    _ratios: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCY_WINDOW))

    def judge(self, outcome: Outcome, target: ServiceTarget) -> None:
        """A request ended on the replica."""
        if outcome.meets(target):
            self._good_tokens += outcome.request.output_tokens
        ratio = outcome.service_ratio(target)
        if ratio is not None:
            self._ratios.append(ratio)

    def control(self, now_s: float, seconds: float, *, num_waiting: int, oldest_wait_s: float) -> None:
        """Let the controller see the period that ends now."""
        self.sizing.observe(self._observe(now_s, seconds, num_waiting, oldest_wait_s))

    def resize(self, now_s: float, index: int) -> SizeChange | None:
        """Give the planner the size that the controller wants, where it is another."""
        decision = self.sizing.decide()
        planner = self.replica.planner
        wanted = min(decision.batch_size, planner.step_tokens)
        if planner.mode == "serial" or wanted == planner.max_batch_size:
            return None
        self.replica.set_batch_size(wanted)
        return SizeChange(now_s, index, wanted, decision.reason)

    def _observe(self, now_s: float, seconds: float, num_waiting: int, oldest_wait_s: float) -> Observation:
        replica, planner = self.replica, self.replica.planner
        running = list(islice(planner.sequences, planner.num_running))
        steps, busy_s = replica.steps - self._steps, replica.busy_s - self._busy_s
        ratios = sorted(self._ratios)
        observation = Observation(
            now_s=now_s,
            seconds=seconds,
            steps=steps,
            step_s=busy_s / steps if steps else 0.0,
            tokens=replica.tokens - self._tokens,
            good_tokens=self._good_tokens,
            num_running=len(running),
            num_waiting=num_waiting,
            oldest_wait_s=oldest_wait_s,
            # The share of its target that the engine takes from the claim on: what a batch size can mend. Time in the
            # queue is left out; a smaller batch, which is the answer to too high a latency, would lengthen it.
            p99_s=ratios[int(0.99 * (len(ratios) - 1))] if ratios else None,
            target_s=1.0 if ratios else None,
            preemptions=planner.num_preemptions - self._preemptions,
            kv_blocks_used=planner.allocator.used,
            kv_blocks_total=planner.allocator.num_blocks,
            cost=self.cost,
            mean_context_tokens=sum(len(s.tokens) for s in running) / len(running) if running else 0.0,
            telemetry=Readings(utilization_percent=min(100.0, 100 * busy_s / seconds)),
        )
        self._steps, self._busy_s, self._tokens = replica.steps, replica.busy_s, replica.tokens
        self._good_tokens, self._preemptions = 0, planner.num_preemptions
        return observation
