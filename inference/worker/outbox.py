"""Hands each step's outcome to Redis: journal, then replies, then ends; blocks the loop rather than lose a token."""

import logging
import queue
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import redis

from inference.logprobs import expire_logprobs, keep_logprobs
from inference.messages import HISTORY_LENGTH, Finish, RequestEvent, SequenceUpdate
from inference.shedding import add_message
from inference.worker.active import STATES, ActiveRequest
from inference.worker.inbox import Cancelled, Inbox, Lost
from inference.worker.lease import Lease
from scheduling import store
from scheduling.core.sequence import TokenLogprob
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import TenantLimits

logger = logging.getLogger(__name__)

MAX_WAITING_STEPS = 8
"""Steps handed over and not yet taken; with more the loop waits."""
REPLIES_LENGTH = 20_000
"""Messages that a web process may be behind before it loses some, about."""
REPLIES_KEEP_S = 600
"""A reply stream that got nothing for about this long goes; its reader is gone, or finds a new one."""
CANCELS_PERIOD_S = 0.1
"""How often cancels are asked for while no step is handed over."""
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
COMPLAINT_PERIOD_S = 5.0

_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Output:
    """New tokens of one request, and its end if this is it. `journals` is false for what the journal has already."""

    active: ActiveRequest
    start: int
    token_ids: list[int]
    texts: list[str]
    finish: Finish | None = None
    event: RequestEvent | None = None
    journals: bool = True
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Handover:
    """The outcome of one step of one owner, and the requests it gives back to the queue after that."""

    owner: str
    outputs: list[Output] = field(default_factory=list)
    releases: dict[str, int] = field(default_factory=dict)
    """Request id -> the attempt that is given back: a repeated handover may find that the next has begun here."""
    failures: dict[str, int] = field(default_factory=dict)
    """Given back as well, and counted as failed: they may be to blame."""

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.outputs or self.releases or self.failures)


class Outbox(threading.Thread):
    """A thread that sends handovers in order and repeats what fails for ever; whatever it sends may be repeated."""

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        fleet: FleetQueue,
        *,
        lease: Lease,
        inbox: Inbox,
    ) -> None:
        """The inbox hears which requests the loop should drop."""
        super().__init__(name="outbox", daemon=True)
        self._client = client
        self._keys = keys
        self._fleet = fleet
        self._limits = TenantLimits(keys)
        self._lease = lease
        self._inbox = inbox
        self._waiting: queue.Queue[Handover | None] = queue.Queue(MAX_WAITING_STEPS)
        self._giving_up = threading.Event()
        self._num_offered = 0
        self._num_taken = 0
        self._num_delivered = 0
        self._kept: dict[str, float] = {}
        self._complained_s = 0.0

    def offer(self, handover: Handover, timeout_s: float) -> bool:
        """Hand over a step; False where the outbox is still full after `timeout_s`."""
        try:
            self._waiting.put(handover, timeout=timeout_s)
        except queue.Full:
            return False
        self._num_offered += 1
        return True

    @property
    def is_clear(self) -> bool:
        """Whether all that was offered has reached Redis; asked by the thread that offers."""
        return self._num_delivered == self._num_offered

    def close(self, timeout_s: float) -> bool:
        """Send what waits, and end; give up after `timeout_s`. Whether all was sent."""
        deadline = time.monotonic() + timeout_s
        try:
            self._waiting.put(None, timeout=timeout_s)
            self.join(max(0.0, deadline - time.monotonic()))
        except queue.Full:
            logger.error("Redis does not answer; the last steps are given up, another engine process repeats them.")
        sent = not self.is_alive()
        self._giving_up.set()
        return sent

    def run(self) -> None:
        """Send until closed."""
        is_open = True
        while is_open and not self._giving_up.is_set():
            handovers, is_open = self._next()
            for handover in handovers:
                self._persist(handover)
            self._num_delivered = self._num_taken
            if not handovers and is_open:
                self._persist(Handover(self._lease.owner))

    def _next(self) -> tuple[list[Handover], bool]:
        """All that waits, the steps of one owner made one; False at the end."""
        handovers: list[Handover] = []
        try:
            handover = self._waiting.get(timeout=CANCELS_PERIOD_S)
            while handover is not None:
                self._num_taken += 1
                if handovers and handovers[-1].owner == handover.owner:
                    merge(handovers[-1], handover)
                else:
                    handovers.append(handover)
                handover = self._waiting.get_nowait()
        except queue.Empty:
            return handovers, True
        return handovers, False

    def _persist(self, handover: Handover) -> None:
        """Deliver, for ever if need be."""
        attempt = 0
        while not self._giving_up.is_set():
            try:
                self._deliver(handover)
                return
            except redis.RedisError as error:
                self._complain(error)
                self._giving_up.wait(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
                attempt += 1

    def _complain(self, error: redis.RedisError) -> None:
        now = time.monotonic()
        if now - self._complained_s >= COMPLAINT_PERIOD_S:
            self._complained_s = now
            logger.error("A step cannot be handed over, so the batch waits: %s", error)

    def _deliver(self, handover: Handover) -> None:
        """Journal, replies, ends and cancels in one round trip; a second one for what follows from an end."""
        ends = [output for output in handover.outputs if output.finish is not None]
        journals = self._journal(handover)
        kept = self._logprobs_of(handover)
        commands: list[store.Command[Any]] = [*kept, *journals, *self._replies(handover.outputs)]
        first_end = len(commands)
        commands += [self._finish(handover.owner, end) for end in ends]
        commands.append(self._fleet.take_cancels(handover.owner))
        if handover.releases:
            commands.append(self._fleet.release(handover.owner, handover.releases))
        if handover.failures:
            commands.append(self._fleet.release(handover.owner, handover.failures, failed=True))
        replies = store.execute_many(self._client, commands)
        cancels = replies[first_end + len(ends)]
        lost = set(replies[len(kept)] if journals else ()) - {end.active.request.id for end in ends}
        done = [end for end, held in zip(ends, replies[first_end:], strict=False) if held or self._was_ended(end)]
        if done:
            store.execute_many(self._client, [*map(self._settle, _with_tenant(done)), self._history(done)])
        if lost:
            # Of two attempts in one handover the earlier is the lost one, so the outputs are read backwards.
            attempts = {o.active.request.id: o.active.attempt for o in reversed(handover.outputs)}
            self._inbox.put(Lost({request_id: attempts[request_id] for request_id in sorted(lost)}))
        if cancels:
            self._inbox.put(Cancelled(cancels))

    def _logprobs_of(self, handover: Handover) -> list[store.Command[Any]]:
        """What is kept of requests that ask for log probabilities, before their tokens are journalled."""
        commands: list[store.Command[Any]] = []
        for o in handover.outputs:
            request = o.active.request
            if o.logprobs and o.journals:
                commands += keep_logprobs(self._keys, request.model, request.id, o.start, o.logprobs)
            if o.finish is not None and request.sampling.logprobs is not None:
                commands.append(expire_logprobs(self._keys, request.model, request.id, request.keep_s))
        return commands

    def _journal(self, handover: Handover) -> list[store.Command[list[str]]]:
        """One command, or none where there are no new tokens."""
        appends = [
            (o.active.request.id, o.active.attempt, o.start, struct.pack(f"<{len(o.token_ids)}i", *o.token_ids))
            for o in handover.outputs
            if o.journals and o.token_ids
        ]
        return [self._fleet.journal(handover.owner, appends)] if appends else []

    def _replies(self, outputs: Sequence[Output]) -> list[store.Command[Any]]:
        """One message for each web process."""
        updates: defaultdict[str, list[SequenceUpdate]] = defaultdict(list)
        for o in outputs:
            if o.active.request.reply_to:
                update = SequenceUpdate(
                    o.active.request.id, o.active.attempt, o.start, o.token_ids, o.texts, o.finish, o.logprobs
                )
                updates[o.active.request.reply_to].append(update)
        commands: list[store.Command[Any]] = []
        for web, message in updates.items():
            key = self._keys.replies(web)
            commands.append(add_message(key, REPLIES_LENGTH, _encode(message)))
            if self._is_due(web):
                commands.append(store.Command(("EXPIRE", key, REPLIES_KEEP_S), bool))
        return commands

    def _is_due(self, web: str) -> bool:
        """Whether a reply stream's time to live should be moved; now and then, to save the call."""
        now = time.monotonic()
        if now < self._kept.get(web, 0.0):
            return False
        if len(self._kept) > 1000:
            self._kept.clear()
        self._kept[web] = now + REPLIES_KEEP_S / 4
        return True

    def _finish(self, owner: str, end: Output) -> store.Command[bool]:
        assert end.finish is not None
        active = end.active
        return self._fleet.finish(
            owner,
            active.request.id,
            active.attempt,
            state=STATES[end.finish.reason],
            used_tokens=active.used_tokens,
            prompt_tokens=active.prompt_tokens,
            finish=_encode(end.finish),
            output=active.output,
        )

    def _was_ended(self, end: Output) -> bool:
        """Whether an end that was answered "not held" is our own, sent before a reply was lost."""
        record = store.execute(self._client, self._fleet.record(end.active.request.id))
        return record is not None and record.attempt == end.active.attempt and record.finish == _encode(end.finish)

    def _settle(self, end: Output) -> store.Command[Any]:
        request = end.active.request
        # Less than nothing where a guessed prompt was longer, or an upstream gave more than it was asked for.
        refund = request.charged_tokens - end.active.used_tokens
        return self._limits.settle(request.tenant, request.id, refund_tokens=refund)

    def _history(self, done: Sequence[Output]) -> store.Command[Any]:
        """May arrive twice where a reply was lost; the historian takes an id once."""
        return add_message(self._keys.history, HISTORY_LENGTH, _encode([end.event for end in done]))


def _with_tenant(ends: Sequence[Output]) -> list[Output]:
    """A request that cannot be read has no tenant to settle with."""
    return [end for end in ends if end.active.request.tenant]


def merge(earlier: Handover, later: Handover) -> None:
    """Add a later step to an earlier one, so that a request has one output for its tokens of both."""
    last = {output.active.request.id: output for output in earlier.outputs}
    for output in later.outputs:
        before = last.get(output.active.request.id)
        if before is None or before.journals != output.journals or before.active is not output.active:
            earlier.outputs.append(output)
            last[output.active.request.id] = output
        else:
            before.token_ids += output.token_ids
            before.texts += output.texts
            before.logprobs += output.logprobs
            before.finish, before.event = output.finish, output.event
    earlier.releases |= later.releases
    earlier.failures |= later.failures
