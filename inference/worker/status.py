"""Puts together what an engine process says of itself: its status several times a second, and a record per second."""

import os
import socket
import time
from collections.abc import Collection

import msgspec

from inference.messages import ReplicaStatus
from inference.worker.active import ActiveRequest
from inference.worker.gate import Gate
from inference.worker.intake import Intake
from inference.worker.meters import Meters
from inference.worker.reporter import PERIOD_S, Reporter
from inference.worker.spec import EngineSpec
from scheduling.core.planner import StepPlanner


def first_status(spec: EngineSpec) -> ReplicaStatus:
    """The status of a process that is loading its model."""
    now = time.time()
    return ReplicaStatus(
        replica=spec.replica,
        model=spec.deployment.name,
        host=socket.gethostname(),
        pid=os.getpid(),
        state="starting",
        time_s=now,
        started_s=now,
        detail="Loading the model.",
        mode=spec.deployment.mode,
        max_batch_size=spec.deployment.max_batch_size,
        restarts=dict(spec.restarts),
    )


class StatusBoard:
    """Read by the loop's thread only, so that it needs no lock; the reporter gets finished messages."""

    def __init__(
        self, first: ReplicaStatus, detail: str, *, planner: StepPlanner, meters: Meters, gate: Gate, intake: Intake
    ) -> None:
        self._first = msgspec.structs.replace(first, detail=detail)
        self._planner = planner
        self._meters = meters
        self._gate = gate
        self._intake = intake
        self._due_s = 0.0
        self._shown: tuple[object, ...] = ()
        self._announced = ("", 0)

    def announce(self, policy: str, revision: int) -> None:
        """Show a policy before the first claim under it."""
        self._announced = (policy, revision)

    def update(self, reporter: Reporter, active: Collection[ActiveRequest]) -> None:
        """Publish what is due; called once a step."""
        now = time.time()
        shown = (self._gate.state, self._planner.mode, self._planner.max_batch_size, self.current_policy())
        if 0 <= self._due_s - now <= PERIOD_S and shown == self._shown:
            return
        self._due_s = now + PERIOD_S
        self._shown = shown
        self._close_second(reporter, now)
        reporter.publish(self._status(active, now))

    def current_policy(self) -> tuple[str, int]:
        """The newer of what was announced and what the last claim saw."""
        seen = (self._intake.policy, self._intake.revision)
        return self._announced if self._announced[1] > seen[1] else seen

    def _close_second(self, reporter: Reporter, now: float) -> None:
        policy, revision = self.current_policy()
        allocator = self._planner.allocator
        event = self._meters.close_second(
            now,
            replica=self._first.replica,
            model=self._first.model,
            mode=self._planner.mode,
            kv_blocks_used=allocator.used,
            kv_blocks_total=allocator.num_blocks,
            preemptions=self._planner.num_preemptions,
            policy=policy,
            policy_revision=revision,
        )
        if event is not None:
            reporter.record(event)

    def _status(self, active: Collection[ActiveRequest], now: float) -> ReplicaStatus:
        policy, revision = self.current_policy()
        allocator, meters = self._planner.allocator, self._meters
        return msgspec.structs.replace(
            self._first,
            state=self._gate.state,
            time_s=now,
            mode=self._planner.mode,
            max_batch_size=self._planner.max_batch_size,
            slots=[one.slot() for one in active],
            batch_tokens=sum(sequence.num_computed for sequence in self._planner.sequences),
            kv_blocks_total=allocator.num_blocks,
            kv_blocks_used=allocator.used,
            kv_block_size=allocator.block_size,
            steps=meters.steps,
            prompt_tokens=meters.prompt_tokens,
            output_tokens=meters.output_tokens,
            preemptions=self._planner.num_preemptions,
            finished=dict(meters.finished),
            tokens_per_s=meters.tokens_per_s,
            step_ms_p50=meters.step_ms(0.5),
            step_ms_p99=meters.step_ms(0.99),
            overhead_percent=meters.overhead_percent,
            policy=policy,
            policy_revision=revision,
            queue_time=meters.queue_time.read(),
            time_to_first_token=meters.time_to_first_token.read(),
            time_per_output_token=meters.time_per_output_token.read(),
            end_to_end=meters.end_to_end.read(),
        )
