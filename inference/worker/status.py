"""Puts together what an engine process says of itself: its status ten times a second, and a record per second."""

import os
import socket
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import astuple
from typing import Any, NamedTuple

import msgspec

from inference.messages import BatchEvent, DeploymentSpec, ReplicaStatus
from inference.plan import settings_digest
from inference.worker.active import ActiveRequest
from inference.worker.batch import Batch
from inference.worker.gate import Gate
from inference.worker.intake import Intake
from inference.worker.meters import Meters
from inference.worker.reporter import NEWS_PERIOD_S, PERIOD_S, Reporter
from inference.worker.sizer import Sizer
from inference.worker.spec import EngineSpec


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
        settings=settings_digest(spec.deployment),
        backend=spec.deployment.backend,
    )


class _Totals(NamedTuple):
    """What grows over the life of a planner and is told by the second."""

    prefix_tokens: int = 0
    prefix_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


def _read_totals(planner: Batch) -> _Totals:
    prefix, swap, drafter = planner.prefix, planner.swap, planner.drafter
    found = (prefix.num_tokens, prefix.num_hit_tokens) if prefix else (0, 0)
    moved = (swap.num_out, swap.num_in) if swap else (0, 0)
    guessed = (drafter.num_drafted, drafter.num_accepted) if drafter else (0, 0)
    return _Totals(*found, *moved, *guessed)


class StatusBoard:
    """Read by the loop's thread only, so that it needs no lock; the reporter gets finished messages."""

    def __init__(
        self,
        first: ReplicaStatus,
        detail: str,
        *,
        planner: Batch,
        meters: Meters,
        gate: Gate,
        intake: Intake,
        sizer: Sizer,
    ) -> None:
        self._first = msgspec.structs.replace(first, detail=detail)
        self._planner = planner
        self._meters = meters
        self._gate = gate
        self._intake = intake
        self._sizer = sizer
        self._totals = _Totals()
        self._fired: Counter[str] = Counter()
        self._due_s = 0.0
        self._shown: tuple[object, ...] = ()
        self._batch = (0, 0)
        self._told_s = 0.0
        self._announced = ("", 0)

    def announce(self, policy: str, revision: int) -> None:
        """Show a policy before the first claim under it."""
        self._announced = (policy, revision)

    def adopt(self, deployment: DeploymentSpec) -> None:
        """Say from now on that these settings are taken up."""
        self._first = msgspec.structs.replace(self._first, settings=settings_digest(deployment))

    def describe(self, detail: str) -> None:
        """Say from now on that the model is computed like this."""
        self._first = msgspec.structs.replace(self._first, detail=detail)

    def update(self, reporter: Reporter, active: Collection[ActiveRequest]) -> None:
        """Publish what is due; called once a step."""
        now = time.time()
        sizing = (self._planner.mode, self._planner.max_batch_size, self._sizer.name)
        shown = (self._gate.state, sizing, self.current_policy())
        batch = (len(active), sum(self._meters.finished.values()))
        is_news = shown != self._shown or (batch != self._batch and not 0 <= now - self._told_s < NEWS_PERIOD_S)
        if 0 <= self._due_s - now <= PERIOD_S and not is_news:
            return
        self._batch, self._told_s = batch, now
        self._due_s = (now // PERIOD_S + 1) * PERIOD_S  # so that seconds end with the clock's
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
            reporter.record(self._with_totals(event))

    def _with_totals(self, event: BatchEvent) -> BatchEvent:
        """The second's event with what planner and sizer did in it."""
        before, self._totals = self._totals, _read_totals(self._planner)
        log = self._planner.trigger_log
        fired, self._fired = log.counts - self._fired, Counter(log.counts)
        return msgspec.structs.replace(
            event,
            max_batch_size=self._planner.max_batch_size,
            sizing=self._sizer.name,
            step_cost=list(astuple(cost)) if (cost := self._sizer.cost) else [],
            triggers=dict(fired),
            trigger_reason=log.latest.reason if log.latest and fired else "",
            **{name: now - then for name, now, then in zip(_Totals._fields, self._totals, before, strict=True)},
        )

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
            **self._decisions(),
        )

    def _decisions(self) -> dict[str, Any]:
        """What sizing, triggers, preemption and reuse have decided."""
        planner, log = self._planner, self._planner.trigger_log
        host = planner.swap.allocator if planner.swap else None
        return {
            "sizing": self._sizer.name,
            "sizing_params": self._sizer.params,
            "size_changes": list(self._sizer.changes),
            "trigger": log.latest.trigger if log.latest else "",
            "trigger_reason": log.latest.reason if log.latest else "",
            "triggers": dict(log.counts),
            "slot_preemptions": planner.num_slot_preemptions,
            "kv_blocks_cached": planner.allocator.num_cached,
            "host_blocks_total": host.num_blocks if host else 0,
            "host_blocks_used": host.used if host else 0,
            **_read_totals(planner)._asdict(),
        }
