"""Sizing in a simulation: each replica's controller sees what those of real engines see, by the same observer."""

from scheduling.core.simulation.outcome import Outcome, ServiceTarget, SizeChange
from scheduling.core.simulation.replica import SimulatedReplica
from scheduling.core.sizing.controller import Readings, Sizing
from scheduling.core.sizing.cost_model import StepCost
from scheduling.core.sizing.observer import Served, SizingObserver, Work


class SizingWatch:
    """A replica's controller, and its eyes."""

    def __init__(self, replica: SimulatedReplica, sizing: Sizing, cost: StepCost) -> None:
        self._replica = replica
        self._sizing = sizing
        self._cost = cost
        self._observer = SizingObserver(replica.planner, self._work(), 0.0)
        self._busy_s = 0.0

    def judge(self, outcome: Outcome, target: ServiceTarget) -> None:
        """A request ended on the replica."""
        assert outcome.claimed_s is not None
        assert outcome.finished_s is not None
        request = outcome.request
        served = Served(
            request.arrival_s,
            outcome.claimed_s,
            outcome.first_token_s,
            outcome.finished_s,
            request.output_tokens,
            request.deadline_s,
        )
        self._observer.count_end(served, target)

    def control(self, now_s: float, seconds: float, *, num_queued: int) -> None:
        """Let the controller see the period that ends now.

        There is no device: its memory is the KV blocks, and all that it could tell is how busy it was.
        """
        work = self._work()
        busy_s, self._busy_s = work.step_s - self._busy_s, work.step_s
        observation = self._observer.observe(
            work,
            now_s,
            num_queued=num_queued,
            memory_batch_limit=None,
            cost=self._cost,
            telemetry=Readings(utilization_percent=min(100.0, 100 * busy_s / seconds)),
        )
        self._sizing.observe(observation)

    def resize(self, now_s: float, index: int) -> SizeChange | None:
        """Give the planner the size that the controller wants, where it is another."""
        decision = self._sizing.decide()
        planner = self._replica.planner
        wanted = min(decision.batch_size, planner.step_tokens)
        if planner.mode == "serial" or wanted == planner.max_batch_size:
            return None
        self._replica.set_batch_size(wanted)
        self._observer.forget()
        return SizeChange(now_s, index, wanted, decision.reason)

    def _work(self) -> Work:
        return Work(self._replica.steps, self._replica.busy_s, self._replica.tokens)
