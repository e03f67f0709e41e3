"""The fleet queue of a simulation, with all that stands before it: admission, policy, and what waits."""

import math
from collections import Counter
from collections.abc import Callable

from scheduling.core.adaptation import PolicyInForce
from scheduling.core.policies import deadline_of
from scheduling.core.policy import Params
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.core.room import Room, UrgentRoom
from scheduling.core.simulation.admission import NO_LIMIT, SimulatedAdmission
from scheduling.core.simulation.outcome import Outcome
from scheduling.core.simulation.replica import SimulatedSequence
from scheduling.core.simulation.settings import SimulationSettings


class SimulatedQueue:
    """Lets requests in as web processes do, and gives them out as the fleet queue does.

    `refused` is told of each request that is turned away or dropped.
    """

    def __init__(
        self, settings: SimulationSettings, clock: Callable[[], float], refused: Callable[[Outcome], None]
    ) -> None:
        self._clock = clock
        self._refused = refused
        self._queue = FlowQueue(clock=clock)
        self._targets = settings.targets
        self.policy = PolicyInForce(settings.policy, self._queue, self._deadline)
        self.admission = SimulatedAdmission(settings.admission)
        self._waiting: dict[str, Outcome] = {}
        """In order of arrival."""
        self._levels: Counter[int] = Counter()
        """How many wait, by priority."""

    def __len__(self) -> int:
        return len(self._waiting)

    def arrive(self, number: int, outcome: Outcome) -> None:
        """Take a request through admission into the queue."""
        request = outcome.request
        entry = QueueEntry(
            id=str(number),
            tenant=request.tenant,
            priority=request.priority,
            arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            deadline_s=request.deadline_s,
            share=request.share,
            drop_expired=request.drop_expired,
        )
        refusal = self._enqueue(entry)
        if refusal:
            self._refuse(outcome, refusal)
            return
        self._waiting[entry.id] = outcome
        self._levels[request.priority] += 1
        self.policy.note(entry)

    def claim(self, owner: str, room: Room, *, is_idle: bool) -> list[SimulatedSequence]:
        """What an engine with this room gets; one with nothing at all also what no room will ever fit, to refuse it."""
        sequences = self._serve(owner, room)
        return self._serve(owner, Room(1, NO_LIMIT)) if is_idle and not sequences else sequences

    def claim_urgent(self, owner: str, room: UrgentRoom) -> list[SimulatedSequence]:
        """What a full engine gets to take the place of something lower: one at most, where the policy lets it."""
        sequences = self._serve(owner, Room(1, room.tokens), room.max_priority)
        for sequence in sequences:
            sequence.is_urgent = True
        return sequences

    def has_urgent(self, room: UrgentRoom) -> bool:
        """Whether one waits that may take the place of something lower."""
        if not self.policy.policy.rules.preempts:
            return False
        return any(count and level <= room.max_priority for level, count in self._levels.items())

    def finish(self, owner: str, sequence: SimulatedSequence, used_tokens: int) -> None:
        """A claimed request has ended; flow and tenant get back what it did not use."""
        self._queue.finish(
            owner, sequence.id, sequence.attempt, state="finished", used_tokens=used_tokens, finish=b"", output=""
        )
        unused_tokens = sequence.num_prompt_tokens + sequence.max_tokens - used_tokens
        self.admission.settle(sequence.tenant, sequence.id, unused_tokens, self._clock())

    def sweep(self) -> None:
        """Drop what waits past its deadline and may be dropped."""
        for one in self._queue.drop_expired():
            self._drop(one.id, one.reason)

    def assess(self, kv_usage: float) -> None:
        """Find the backpressure level."""
        self.admission.assess(self._clock(), self._queue.snapshot(), kv_usage)

    def _serve(self, owner: str, room: Room, max_priority: int | None = None) -> list[SimulatedSequence]:
        """What a claim gives, repeated at once where it only met the bound of what one claim drops or moves."""
        while True:
            claimed = self._queue.claim(
                owner, max_requests=room.requests, max_tokens=room.tokens, lease_s=math.inf, max_priority=max_priority
            )
            for one in claimed.dropped:
                self._drop(one.id, one.reason)
            if claimed.requests or not claimed.more:
                return [SimulatedSequence(one.id, one.attempt, self._leave(one.id)) for one in claimed.requests]

    def _enqueue(self, entry: QueueEntry) -> str:
        """Why a request was refused; "" where it waits now."""
        bounds = self.admission.admit(entry, self._clock())
        if isinstance(bounds, str):
            return bounds
        policy = self.policy
        answer = self._queue.enqueue(
            entry,
            policy.policy.place(entry),
            revision=policy.revision,
            depth_limit=bounds.depth_limit,
            tokens_limit=bounds.tokens_limit,
            shed=bounds.shed,
        )
        for one in answer.shed:
            self._drop(one.id, one.reason)
        if answer.status == "queued":
            return ""
        self.admission.refuse_full(entry, self._clock())
        return "queue_full"

    def _drop(self, request_id: str, reason: str) -> None:
        """A waiting request gave way to one of higher priority, or its deadline has passed."""
        outcome = self._waiting.pop(request_id)
        request = outcome.request
        self._levels[request.priority] -= 1
        self.policy.forget(request_id)
        self._queue.end_shed(request_id, b"")
        unused_tokens = request.prompt_tokens + request.max_tokens
        self.admission.settle(request.tenant, request_id, unused_tokens, self._clock())
        self._refuse(outcome, reason)

    def _deadline(self, entry: QueueEntry, params: Params) -> float:
        """A request's own deadline, or its arrival plus its end-to-end target, or the policy's own target."""
        e2e_s = self._targets.of(entry).e2e_s
        if entry.deadline_s is not None or e2e_s is None:
            return deadline_of(entry, params)
        return entry.arrival_s + e2e_s

    def _leave(self, request_id: str) -> Outcome:
        """A request was claimed."""
        outcome = self._waiting.pop(request_id)
        self._levels[outcome.request.priority] -= 1
        self.policy.forget(request_id)
        return outcome

    def _refuse(self, outcome: Outcome, reason: str) -> None:
        outcome.state, outcome.reason = "refused", reason
        self._refused(outcome)
