"""A discrete-event simulator: replays a trace through the very queue, policies, planner and sizing that serve.

Only the forward pass is a model (`StepCost`), and the clock is virtual. Replicas bind late, as engine processes do:
they claim from one queue what they have room for. What is claimed during a step joins the next one.
"""

import math
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from scheduling.core.adaptation import PERIOD_S as LOOK_S
from scheduling.core.planner import RequestTooLongError, StepPlanner
from scheduling.core.request import Priority
from scheduling.core.room import URGENT_PERIOD_S
from scheduling.core.simulation.control import SizingWatch
from scheduling.core.simulation.memory import CountingBlocks, OwnPrefix
from scheduling.core.simulation.outcome import Outcome, SimulationResult, SizeChange
from scheduling.core.simulation.replica import EOS, OnItsWay, SimulatedReplica, SimulatedSequence
from scheduling.core.simulation.settings import SimulationSettings
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.simulation.waiting import SimulatedQueue
from scheduling.core.sizing.cost_model import StepCost

__all__ = ["SimulationSettings", "Simulator", "simulate"]

PROGRESS_EVERY = 256
"""Requests that end between two reports of progress."""
RETRY_S = 0.25
"""An idle engine that was given nothing although requests wait asks again after this, as engine processes do."""
SWEEP_S = 1.0
"""How often requests past their deadline are looked for, as ops does."""
STALL_S = 3600.0
"""Where nothing has begun or ended for so long and nothing comes, what waits waits for ever."""

_CONTROL, _ASSESS, _JUDGE, _SWEEP, _STEP, _WAKE, _LOOK = range(7)


def simulate(
    trace: Sequence[TraceRequest],
    settings: SimulationSettings,
    cost: StepCost,
    *,
    progress: Callable[[int], None] | None = None,
) -> SimulationResult:
    """Replay a trace; `progress` is told now and then how many of its requests have ended."""
    return Simulator(trace, settings, cost, progress).run()


class Simulator:
    """One run. At equal times arrivals come first, then control, then the steps of replicas by their number."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        settings: SimulationSettings,
        cost: StepCost,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._settings = settings
        self._cost = cost
        self._progress = progress
        self._now = self._moved_s = 0.0
        """The virtual time, and when something last began or ended."""
        self._outcomes = [Outcome(request) for request in trace]
        self._num_arrived = self._num_ended = 0
        self._has_levels = len({request.priority for request in trace}) > 1
        self._next_of = [0] * (max(Priority) + 1)
        """Priority -> no request before this number that has yet to come is of it or higher."""
        self._events: list[tuple[float, int, int]] = []
        self._queue = SimulatedQueue(settings, lambda: self._now, self._count_end)
        self._replicas = [self._new_replica() for _ in range(settings.num_replicas)]
        self._listening = list(range(settings.num_replicas))
        """Replicas in the order in which they hear of an arrival: who claimed last is last."""
        self._wakes: list[float | None] = [None] * settings.num_replicas
        self._size_changes: list[SizeChange] = []
        self._watches: list[SizingWatch] = []
        if settings.sizing is not None:
            makers = enumerate(self._replicas)
            self._watches = [SizingWatch(replica, settings.sizing(index), cost) for index, replica in makers]
            self._resize()
        self._drops = any(request.drop_expired for request in trace)
        self._schedule_control()
        self._is_controlled = bool(self._events)

    def run(self) -> SimulationResult:
        """Handle events in their order until nothing is left to happen."""
        events, total = self._events, len(self._outcomes)
        while not self._is_stalled():
            if self._num_arrived < total and not (events and events[0][0] < self._next_arrival_s):
                self._arrive()
            elif events:
                self._happen(*heappop(events))
            else:
                break
        if self._progress is not None:
            self._progress(total)
        return self._result()

    def _schedule_control(self) -> None:
        """The first of each kind of event that comes at regular intervals."""
        settings, queue = self._settings, self._queue
        if self._watches:
            self._schedule(_CONTROL, settings.control_period_s)
        if settings.admission is not None and queue.admission.is_assessed:
            self._schedule(_ASSESS, settings.admission.period_s)
        if queue.policy.is_adaptive:
            self._schedule(_JUDGE, LOOK_S)
        if self._drops:
            self._schedule(_SWEEP, SWEEP_S)

    def _schedule(self, kind: int, after_s: float, index: int = 0) -> None:
        heappush(self._events, (self._now + after_s, kind, index))

    def _happen(self, time_s: float, kind: int, index: int) -> None:
        if (kind <= _SWEEP or kind == _LOOK) and self._is_over():
            return
        self._now = time_s
        if kind == _STEP:
            self._end_step(index)
        elif kind == _WAKE:
            if self._wakes[index] == time_s and self._replicas[index].busy_until_s is None:
                self._turn(index)
        elif kind == _LOOK:
            if self._replicas[index].look_s == time_s:
                self._look(index)
        elif kind == _CONTROL:
            self._control()
        elif kind == _ASSESS:
            self._assess()
        elif kind == _SWEEP:
            self._queue.sweep()
            self._schedule(_SWEEP, SWEEP_S)
        else:
            self._queue.policy.judge(time_s)
            self._schedule(_JUDGE, LOOK_S)

    @property
    def _next_arrival_s(self) -> float:
        if self._num_arrived == len(self._outcomes):
            return math.inf
        return self._outcomes[self._num_arrived].request.arrival_s

    def _may_preempt(self) -> bool:
        """Whether anybody could ever take another's slot: by the policy, and since there are levels to tell apart."""
        return self._has_levels and self._queue.policy.policy.rules.preempts

    def _next_arrival_of(self, max_priority: int) -> float:
        """When the next request of this priority number or lower arrives."""
        outcomes, number = self._outcomes, max(self._num_arrived, self._next_of[max_priority])
        while number < len(outcomes) and outcomes[number].request.priority > max_priority:
            number += 1
        self._next_of[max_priority] = number
        return outcomes[number].request.arrival_s if number < len(outcomes) else math.inf

    def _is_over(self) -> bool:
        """Whether only control events are left."""
        return (
            self._num_arrived == len(self._outcomes)
            and not self._queue
            and not any(replica.planner.sequences or replica.on_its_way for replica in self._replicas)
        )

    def _is_stalled(self) -> bool:
        """Whether what is left waits for a trigger that nothing will ever pull."""
        return self._num_arrived == len(self._outcomes) and self._now - self._moved_s > STALL_S

    def _arrive(self) -> None:
        """Let the next request in; whoever has room for it claims it."""
        number = self._num_arrived
        outcome = self._outcomes[number]
        self._now = self._moved_s = outcome.request.arrival_s
        self._num_arrived += 1
        self._queue.arrive(number, outcome)
        for index in tuple(self._listening):
            if not self._queue:
                return
            if self._replicas[index].busy_until_s is None:
                self._turn(index)
            else:
                self._claim(index)

    def _turn(self, index: int) -> None:
        """What an engine does between two steps: take what came, plan, claim what there is room for, compute."""
        replica = self._replicas[index]
        self._wakes[index] = None
        self._take(index)
        if replica.plan(self._now):
            self._claim(index)
        else:
            # Nothing to compute: what it claims now need not wait for a step, only for its way here.
            self._claim(index)
            self._take(index)
            if not replica.plan(self._now):
                self._sleep(index)
                return
        claimable_s = self._now if self._queue else self._next_arrival_s
        self._moved_s = self._now
        heappush(self._events, (replica.start(self._now, self._horizon_s(replica), claimable_s), _STEP, index))

    def _sleep(self, index: int) -> None:
        """Until something that is on its way arrives, a batch is due, or it is time to ask again."""
        replica = self._replicas[index]
        due_s = replica.planner.due_s(self._now)
        if due_s is None and self._queue:
            due_s = RETRY_S
        # At least the next float, or a wait that rounds to nothing would be waited for ever.
        soonest_s = math.nextafter(self._now, math.inf)
        wake_s = max(min(math.inf if due_s is None else self._now + due_s, replica.ready_s), soonest_s)
        if wake_s < math.inf:
            self._wakes[index] = wake_s
            heappush(self._events, (wake_s, _WAKE, index))

    def _horizon_s(self, replica: SimulatedReplica) -> float:
        """Until when nothing can reach this replica: a claim needs room, and something to claim that fits it."""
        horizon_s = min(self._next_control_s(), replica.ready_s)
        if self._may_preempt() and (urgent := replica.urgent_room):
            is_here = self._queue.has_urgent(urgent)
            claimable_s = self._now if is_here else self._next_arrival_of(urgent.max_priority)
            horizon_s = min(horizon_s, self._next_look_s(replica, claimable_s))
        if not replica.room.requests:
            return horizon_s
        if self._queue and (self._queue.policy.is_timed or self._drops):
            return self._now
        if self._queue and self._events:
            horizon_s = min(horizon_s, self._events[0][0])
        return min(horizon_s, self._next_arrival_s)

    def _next_control_s(self) -> float:
        if not self._is_controlled:
            return math.inf
        return min((time_s for time_s, kind, _ in self._events if kind <= _SWEEP), default=math.inf)

    def _claim(self, index: int) -> None:
        """Claim what there is room for; it is on its way then."""
        if not self._queue:
            return
        replica = self._replicas[index]
        if (room := replica.room).requests > 0:
            is_idle = not replica.planner.num_running and not replica.planner.num_waiting and not replica.on_its_way
            self._expect(index, self._queue.claim(str(index), room, is_idle=is_idle) or self._claim_urgent(index))
        elif self._has_urgent(replica):
            due_s = self._next_look_s(replica, self._now)
            if replica.look_s != due_s:
                replica.look_s = due_s
                heappush(self._events, (due_s, _LOOK, index))

    def _look(self, index: int) -> None:
        """A full engine looks whether anything may take the place of a lower one."""
        replica = self._replicas[index]
        replica.look_s = None
        if replica.busy_until_s is not None and replica.room.requests <= 0:
            replica.looked_s = self._now
            self._expect(index, self._claim_urgent(index))
            self._claim(index)

    def _next_look_s(self, replica: SimulatedReplica, from_s: float) -> float:
        """When a full engine looks first from then on: at intervals since it claimed last."""
        if from_s == math.inf:
            return math.inf
        periods = max(1, math.ceil((from_s - replica.looked_s) / URGENT_PERIOD_S))
        return max(from_s, replica.looked_s + periods * URGENT_PERIOD_S)

    def _has_urgent(self, replica: SimulatedReplica) -> bool:
        """Whether one waits that may take the place of a lower one there."""
        if not self._may_preempt():
            return False
        urgent = replica.urgent_room
        return urgent is not None and self._queue.has_urgent(urgent)

    def _claim_urgent(self, index: int) -> list[SimulatedSequence]:
        """What may take the place of a lower one."""
        replica = self._replicas[index]
        urgent = replica.urgent_room if self._has_urgent(replica) else None
        return [] if urgent is None else self._queue.claim_urgent(str(index), urgent)

    def _expect(self, index: int, claimed: list[SimulatedSequence]) -> None:
        """What was claimed is on its way."""
        ready_s = self._now + self._settings.claim_s
        for sequence in claimed:
            outcome = sequence.outcome
            outcome.state, outcome.claimed_s, outcome.replica = "running", ready_s, index
            self._replicas[index].on_its_way.append(OnItsWay(sequence, ready_s))
        if claimed:
            self._replicas[index].looked_s = self._now
            self._listening.remove(index)
            self._listening.append(index)

    def _take(self, index: int) -> None:
        """Give the planner what has arrived."""
        replica = self._replicas[index]
        while replica.ready_s <= self._now:
            sequence = replica.on_its_way.popleft().sequence
            try:
                replica.add(sequence)
            except RequestTooLongError:
                sequence.outcome.state, sequence.outcome.reason = "refused", "too long"
                self._end(index, sequence, 0)

    def _end_step(self, index: int) -> None:
        for output in self._replicas[index].end_step():
            sequence = output.sequence
            assert isinstance(sequence, SimulatedSequence)
            outcome = sequence.outcome
            if outcome.first_token_s is None:
                outcome.first_token_s = self._now
            if output.finish is not None:
                outcome.finished_s, outcome.state = self._now, "finished"
                self._end(index, sequence, len(sequence.tokens))
                if self._watches:
                    self._watches[index].judge(outcome, self._settings.targets.of(outcome.request))
        self._turn(index)

    def _end(self, index: int, sequence: SimulatedSequence, used_tokens: int) -> None:
        self._queue.finish(str(index), sequence, used_tokens)
        self._count_end(sequence.outcome)

    def _count_end(self, outcome: Outcome) -> None:
        self._num_ended += 1
        self._moved_s = self._now
        if self._progress is not None and self._num_ended % PROGRESS_EVERY == 0:
            self._progress(self._num_ended)

    def _control(self) -> None:
        """Let every replica's sizing controller see the period and decide."""
        period_s = self._settings.control_period_s
        for watch in self._watches:
            watch.control(self._now, period_s, num_queued=len(self._queue))
        self._resize()
        self._schedule(_CONTROL, period_s)

    def _resize(self) -> None:
        changes = [watch.resize(self._now, index) for index, watch in enumerate(self._watches)]
        self._size_changes += [change for change in changes if change is not None]

    def _assess(self) -> None:
        """Backpressure, as web processes find it several times a second."""
        assert self._settings.admission is not None
        allocators = [replica.planner.allocator for replica in self._replicas]
        self._queue.assess(sum(one.used for one in allocators) / sum(one.num_blocks for one in allocators))
        self._schedule(_ASSESS, self._settings.admission.period_s)

    def _new_replica(self) -> SimulatedReplica:
        settings = self._settings
        swap, allocator = settings.swap, CountingBlocks(settings.num_blocks, settings.block_size)
        planner = StepPlanner(
            settings.mode,
            settings.batch_size,
            settings.step_tokens,
            allocator,
            settings.max_model_len,
            lambda: self._now,
            eos_token_ids=frozenset({EOS}),
            prefix=OwnPrefix(allocator) if settings.prefix_cache else None,
            swap=swap.make_space(settings.block_size, self._cost) if swap else None,
            trigger=settings.trigger,
            long_prefill_threshold=settings.long_prefill_threshold,
        )
        return SimulatedReplica(planner, self._cost, swap=swap, pace=settings.pace, fast_forward=settings.fast_forward)

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
            policy_changes=list(self._queue.policy.changes),
            num_replicas=len(self._replicas),
        )
