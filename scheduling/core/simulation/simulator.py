"""A discrete-event simulator: replays a trace through the very queue, policies, planner and sizing that serve.

Only the forward pass is a model (`StepCost`), and the clock is virtual. Replicas bind late, as engine processes do:
they claim from one queue, between two steps, what they have room for.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice

from scheduling.core.answers import Enqueued
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import Mode, RequestTooLongError, StepPlanner
from scheduling.core.policy import Policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.core.simulation.admission import NO_LIMIT, AdmissionSettings, SimulatedAdmission
from scheduling.core.simulation.outcome import Outcome, ServiceTargets, SimulationResult, SizeChange
from scheduling.core.simulation.policy import SimulatedPolicy
from scheduling.core.simulation.replica import EOS, SimulatedReplica, SimulatedSequence, SwapSettings
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.controller import Observation, Sizing
from scheduling.core.sizing.cost_model import StepCost

PROGRESS_EVERY = 256
"""Arrivals between two reports of progress."""
RETRY_S = 0.25
"""An idle engine that was given nothing although requests wait asks again after this, as engine processes do."""
LATENCY_WINDOW = 256
"""How many of the latest requests of a replica a sizing controller judges by."""

_CONTROL, _ASSESS, _JUDGE, _STEP, _WAKE = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """A fleet: its policy, its replicas, and what each of them may hold."""

    policy: Policy
    num_replicas: int = 1
    mode: Mode = "continuous"
    batch_size: int = 64
    step_tokens: int = 2048
    num_blocks: int = 16_384
    block_size: int = 16
    max_model_len: int = 1_000_000
    targets: ServiceTargets = field(default_factory=ServiceTargets)
    sizing: Callable[[int], Sizing] | None = None
    """Makes the controller of a replica from its number; None keeps the batch size."""
    control_period_s: float = 0.5
    admission: AdmissionSettings | None = None
    """None admits everything."""
    swap: SwapSettings | None = None
    """None recomputes what is preempted."""
    fast_forward: bool = True
    """Takes runs of like steps at once; without, the result is the same and later."""

    def __post_init__(self) -> None:
        if self.num_replicas < 1 or self.control_period_s <= 0:
            raise ValueError("A fleet has at least one replica, and controls it at intervals above 0 s.")


@dataclass(slots=True)
class _Watch:
    """What a replica's sizing controller has seen, to tell one period from the next."""

    sizing: Sizing
    steps: int = 0
    busy_s: float = 0.0
    tokens: int = 0
    good_tokens: int = 0
    preemptions: int = 0
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCY_WINDOW))


def simulate(
    trace: Sequence[TraceRequest],
    settings: SimulationSettings,
    cost: StepCost,
    *,
    progress: Callable[[int], None] | None = None,
) -> SimulationResult:
    """Replay a trace; `progress` is told now and then how many of its requests have arrived."""
    return Simulator(trace, settings, cost).run(progress)


class Simulator:
    """One run. At equal times arrivals come first, then control, then the steps of replicas by their number."""

    def __init__(self, trace: Sequence[TraceRequest], settings: SimulationSettings, cost: StepCost) -> None:
        self._settings = settings
        self._cost = cost
        self._now = 0.0
        self._outcomes = [Outcome(request) for request in trace]
        self._num_arrived = 0
        self._events: list[tuple[float, int, int]] = []
        self._queue = FlowQueue(clock=lambda: self._now)
        self._policy = SimulatedPolicy(settings.policy, self._queue, settings.targets)
        self._waiting: dict[str, Outcome] = {}
        """In order of arrival."""
        self._waiting_tokens = self._claimed = self._claimed_tokens = 0
        self._admission = SimulatedAdmission(settings.admission)
        self._replicas = [self._new_replica() for _ in range(settings.num_replicas)]
        self._wakes: list[float | None] = [None] * settings.num_replicas
        self._watches: list[_Watch] = []
        self._size_changes: list[SizeChange] = []
        if settings.sizing is not None:
            self._watches = [_Watch(settings.sizing(index)) for index in range(settings.num_replicas)]
            for index in range(settings.num_replicas):
                self._resize(index)
            heappush(self._events, (settings.control_period_s, _CONTROL, 0))
        if settings.admission is not None:
            heappush(self._events, (settings.admission.period_s, _ASSESS, 0))
        if self._policy.is_adaptive:
            heappush(self._events, (self._policy.period_s, _JUDGE, 0))

    def run(self, progress: Callable[[int], None] | None = None) -> SimulationResult:
        """Handle events in their order until nothing is left to happen."""
        events, total = self._events, len(self._outcomes)
        while True:
            if self._num_arrived < total and not (events and events[0][0] < self._next_arrival_s):
                self._arrive()
                if progress is not None and self._num_arrived % PROGRESS_EVERY == 0:
                    progress(self._num_arrived)
            elif events:
                self._happen(*heappop(events))
            else:
                break
        if progress is not None:
            progress(total)
        return self._result()

    def _happen(self, time_s: float, kind: int, index: int) -> None:
        if kind <= _JUDGE and self._is_over():
            return
        self._now = time_s
        if kind == _STEP:
            self._end_step(index)
        elif kind == _WAKE:
            if self._wakes[index] == time_s and self._replicas[index].busy_until_s is None:
                self._begin_step(index)
        elif kind == _CONTROL:
            self._control()
        elif kind == _ASSESS:
            self._assess()
        else:
            self._policy.judge(time_s)
            heappush(self._events, (time_s + self._policy.period_s, _JUDGE, 0))

    @property
    def _next_arrival_s(self) -> float:
        if self._num_arrived == len(self._outcomes):
            return math.inf
        return self._outcomes[self._num_arrived].request.arrival_s

    def _is_over(self) -> bool:
        """Whether only control events are left."""
        return (
            self._num_arrived == len(self._outcomes)
            and not self._waiting
            and not any(replica.planner.sequences for replica in self._replicas)
        )

    def _arrive(self) -> None:
        """Admit and enqueue the next request; whoever is idle looks."""
        number = self._num_arrived
        outcome = self._outcomes[number]
        request = outcome.request
        self._now = request.arrival_s
        self._num_arrived += 1
        entry = QueueEntry(
            id=str(number),
            tenant=request.tenant,
            priority=request.priority,
            arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            deadline_s=request.deadline_s,
            share=request.share,
        )
        answer = self._enqueue(entry)
        for shed in answer.shed:
            self._drop(shed.id)
        if answer.status != "queued":
            outcome.state, outcome.reason = "refused", "overloaded"
            return
        self._waiting[entry.id] = outcome
        self._policy.note(entry)
        self._waiting_tokens += entry.cost_tokens
        for index, replica in enumerate(self._replicas):
            if not self._waiting:
                return
            if replica.busy_until_s is None:
                self._begin_step(index)

    def _enqueue(self, entry: QueueEntry) -> Enqueued:
        policy, bounds = self._policy.policy, self._admission.bounds(entry.priority)
        return self._queue.enqueue(
            entry,
            policy.place(entry),
            revision=self._policy.revision,
            depth_limit=bounds.depth_limit,
            keep_s=0,
            tokens_limit=bounds.tokens_limit,
            shed=bounds.shed,
        )

    def _drop(self, request_id: str) -> None:
        """A waiting request gave way to one of higher priority."""
        outcome = self._waiting.pop(request_id)
        outcome.state, outcome.reason = "refused", "shed"
        self._waiting_tokens -= outcome.request.prompt_tokens + outcome.request.max_tokens
        self._policy.forget(request_id)
        self._queue.end_shed(request_id, b"")

    def _begin_step(self, index: int) -> None:
        """What an engine does between two steps: claim what there is room for, plan, compute."""
        replica = self._replicas[index]
        self._claim(index)
        claimable_s = self._now if self._waiting else self._next_arrival_s
        if replica.begin_step(self._now, self._horizon_s(replica), claimable_s):
            assert replica.busy_until_s is not None
            heappush(self._events, (replica.busy_until_s, _STEP, index))
            return
        due_s = replica.planner.due_s(self._now)
        if due_s is None and self._waiting:
            due_s = RETRY_S
        self._wakes[index] = None
        if due_s is not None:
            # At least the next float, or a wait that rounds to nothing would be waited for ever.
            wake_s = max(self._now + due_s, math.nextafter(self._now, math.inf))
            self._wakes[index] = wake_s
            heappush(self._events, (wake_s, _WAKE, index))

    def _horizon_s(self, replica: SimulatedReplica) -> float:
        """Until when nothing can reach this replica: a claim needs room, and something to claim that fits it."""
        horizon_s = self._next_control_s()
        if not replica.planner.room().requests:
            return horizon_s
        if self._waiting and self._policy.is_timed:
            return self._now
        if self._waiting and self._events:
            horizon_s = min(horizon_s, self._events[0][0])
        return min(horizon_s, self._next_arrival_s)

    def _next_control_s(self) -> float:
        if not self._watches and self._settings.admission is None and not self._policy.is_adaptive:
            return math.inf
        return min((time_s for time_s, kind, _ in self._events if kind <= _JUDGE), default=math.inf)

    def _claim(self, index: int) -> None:
        if not self._waiting:
            return
        replica, owner = self._replicas[index], str(index)
        room = replica.planner.room()
        if room.requests <= 0:
            return
        queue, lease_s = self._queue, math.inf
        claimed = queue.claim(owner, max_requests=room.requests, max_tokens=room.tokens, lease_s=lease_s)
        if not claimed.requests and not replica.planner.sequences:
            # A prompt that an empty engine has no room for never fits: it is claimed to be refused, as engines do.
            claimed = queue.claim(owner, max_requests=1, max_tokens=NO_LIMIT, lease_s=lease_s)
        for request in claimed.requests:
            outcome = self._waiting.pop(request.id)
            self._policy.forget(request.id)
            cost_tokens = outcome.request.prompt_tokens + outcome.request.max_tokens
            self._waiting_tokens -= cost_tokens
            self._claimed += 1
            self._claimed_tokens += cost_tokens
            outcome.state, outcome.claimed_s, outcome.replica = "running", self._now, index
            try:
                replica.planner.add(SimulatedSequence(request.id, request.attempt, outcome))
            except RequestTooLongError:
                outcome.state, outcome.reason = "refused", "too long"
                self._finish(owner, request.id, request.attempt, 0)

    def _end_step(self, index: int) -> None:
        for output in self._replicas[index].end_step():
            sequence = output.sequence
            assert isinstance(sequence, SimulatedSequence)
            outcome = sequence.outcome
            if outcome.first_token_s is None:
                outcome.first_token_s = self._now
            if output.finish is not None:
                self._end(index, sequence)
        self._begin_step(index)

    def _end(self, index: int, sequence: SimulatedSequence) -> None:
        outcome = sequence.outcome
        outcome.finished_s, outcome.state = self._now, "finished"
        self._finish(str(index), sequence.id, sequence.attempt, len(sequence.tokens))
        if self._watches:
            self._judge(self._watches[index], outcome)

    def _finish(self, owner: str, request_id: str, attempt: int, used_tokens: int) -> None:
        self._queue.finish(owner, request_id, attempt, state="finished", used_tokens=used_tokens, finish=b"", output="")

    def _judge(self, watch: _Watch, outcome: Outcome) -> None:
        target = self._settings.targets.of(outcome.request)
        if outcome.meets(target):
            watch.good_tokens += outcome.request.output_tokens
        ratio = outcome.service_ratio(target)
        if ratio is not None:
            watch.ratios.append(ratio)

    def _control(self) -> None:
        """Let every replica's sizing controller see the period and decide."""
        for index, watch in enumerate(self._watches):
            watch.sizing.observe(self._observe(self._replicas[index], watch))
            self._resize(index)
        heappush(self._events, (self._now + self._settings.control_period_s, _CONTROL, 0))

    def _resize(self, index: int) -> None:
        decision = self._watches[index].sizing.decide()
        planner = self._replicas[index].planner
        wanted = min(decision.batch_size, planner.step_tokens)
        if planner.mode == "serial" or wanted == planner.max_batch_size:
            return
        planner.set_batch_size(wanted)
        self._size_changes.append(SizeChange(self._now, index, wanted, decision.reason))

    def _observe(self, replica: SimulatedReplica, watch: _Watch) -> Observation:
        planner = replica.planner
        running = list(islice(planner.sequences, planner.num_running))
        steps, busy_s = replica.steps - watch.steps, replica.busy_s - watch.busy_s
        oldest = next(iter(self._waiting.values()), None)
        ratios = sorted(watch.ratios)
        observation = Observation(
            now_s=self._now,
            seconds=self._settings.control_period_s,
            steps=steps,
            step_s=busy_s / steps if steps else 0.0,
            tokens=replica.tokens - watch.tokens,
            good_tokens=watch.good_tokens,
            num_running=len(running),
            num_waiting=len(self._waiting),
            oldest_wait_s=self._now - oldest.request.arrival_s if oldest else 0.0,
            # The share of its target that the engine takes from the claim on: what a batch size can mend. Time in the
            # queue is left out; a smaller batch, which is the answer to too high a latency, would lengthen it.
            p99_s=ratios[int(0.99 * (len(ratios) - 1))] if ratios else None,
            target_s=1.0 if ratios else None,
            preemptions=planner.num_preemptions - watch.preemptions,
            kv_blocks_used=planner.allocator.used,
            kv_blocks_total=planner.allocator.num_blocks,
            cost=self._cost,
            mean_context_tokens=sum(len(s.tokens) for s in running) / len(running) if running else 0.0,
        )
        watch.steps, watch.busy_s, watch.tokens = replica.steps, replica.busy_s, replica.tokens
        watch.good_tokens, watch.preemptions = 0, planner.num_preemptions
        return observation

    def _assess(self) -> None:
        """Backpressure, as web processes find it several times a second."""
        settings = self._admission.settings
        assert settings is not None
        allocators = [replica.planner.allocator for replica in self._replicas]
        self._admission.assess(
            self._now,
            claimed=self._claimed,
            claimed_tokens=self._claimed_tokens,
            depth=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            kv_usage=sum(allocator.used for allocator in allocators) / sum(a.num_blocks for a in allocators),
        )
        heappush(self._events, (self._now + settings.period_s, _ASSESS, 0))

    def _new_replica(self) -> SimulatedReplica:
        settings = self._settings
        planner = StepPlanner(
            settings.mode,
            settings.batch_size,
            settings.step_tokens,
            BlockAllocator(settings.num_blocks, settings.block_size),
            settings.max_model_len,
            lambda: self._now,
            eos_token_ids=frozenset({EOS}),
        )
        return SimulatedReplica(planner, self._cost, swap=settings.swap, fast_forward=settings.fast_forward)

    def _result(self) -> SimulationResult:
        sizes = self._replicas[0].batch_sizes.copy()
        for replica in self._replicas[1:]:
            sizes.update(replica.batch_sizes)
        return SimulationResult(
            outcomes=self._outcomes,
            end_s=self._now,
            steps=sum(replica.steps for replica in self._replicas),
            busy_s=sum(replica.busy_s for replica in self._replicas),
            preemptions=sum(replica.planner.num_preemptions for replica in self._replicas),
            batch_sizes=sizes,
            size_changes=self._size_changes,
            policy_changes=self._policy.changes,
            num_replicas=len(self._replicas),
        )
