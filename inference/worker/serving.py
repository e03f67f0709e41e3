"""What every loop of a worker does between two steps: heeds its inbox, takes what was claimed, hands over what came."""

import logging
import time
from abc import ABC, abstractmethod

from inference.messages import FinishReason
from inference.worker.active import ActiveRequest, RequestRefusedError
from inference.worker.commands import CommandRefusedError, Controls
from inference.worker.gate import Gate
from inference.worker.inbox import Cancelled, Inbox, LeaseLost, Lost, Told, Word
from inference.worker.intake import Intake
from inference.worker.lease import Lease
from inference.worker.meters import Meters
from inference.worker.outbox import Handover, Outbox, Output
from inference.worker.pipe import Pipe
from inference.worker.reporter import Reporter
from inference.worker.sizer import Sizer
from inference.worker.spec import Ack
from inference.worker.status import StatusBoard

logger = logging.getLogger(__name__)

OFFER_WAIT_S = 0.02
"""While the outbox is full, commands are obeyed this often."""
SHUT_WAIT_S = 0.05
"""How long an acknowledgement waits for a claim on its way; longer only while Redis does not answer."""
RESIZING = frozenset({"set_mode", "set_batch_size", "sizing", "deployment"})
"""Commands after which a replica may have less room."""


class ServingLoop(ABC):
    """Holds the requests of one owner. Everything here happens in one thread; others leave word in the inbox."""

    def __init__(
        self,
        *,
        lease: Lease,
        intake: Intake,
        outbox: Outbox,
        reporter: Reporter,
        inbox: Inbox,
        pipe: Pipe,
        gate: Gate,
        controls: Controls,
        board: StatusBoard,
        meters: Meters,
        sizer: Sizer,
    ) -> None:
        self._lease = lease
        self._intake = intake
        self._outbox = outbox
        self._reporter = reporter
        self._inbox = inbox
        self._pipe = pipe
        self._gate = gate
        self._controls = controls
        self._board = board
        self._meters = meters
        self._sizer = sizer
        self._active: dict[str, ActiveRequest] = {}
        self._handover = Handover(lease.owner)

    @abstractmethod
    def run(self) -> None:
        """Serve until told to end. What is held then belongs to the caller to release."""

    @abstractmethod
    def _admit(self, active: ActiveRequest) -> None:
        """Begin with a request. Raises RequestRefusedError."""

    def _heed(self, words: list[Word]) -> None:
        """Commands, cancelled and lost requests, a lost lease. Called in every turn, whatever the loop waits for."""
        self._pipe.beat(self._lease.owner)
        for word in words:
            match word:
                case Told():
                    self._obey(word)
                case Cancelled():
                    self._cancel(word)
                case Lost():
                    self._drop(word)
                case LeaseLost():
                    self._abandon(word.owner)

    def _obey(self, told: Told) -> None:
        message = told.message
        error = ""
        try:
            self._controls.obey(message)
        except CommandRefusedError as refusal:
            error = str(refusal)
        if not self._gate.is_open or message.command in RESIZING:
            self._intake.shut(SHUT_WAIT_S)  # what it had been offered may be too much; this turn offers anew
        if message.id:
            applied_ms = 1000 * (time.monotonic() - told.read_s)
            ack = Ack(id=message.id, ok=not error, error=error, applied_ms=applied_ms, state=self._gate.state)
            self._pipe.send(ack)

    def _cancel(self, cancelled: Cancelled) -> None:
        for request_id in cancelled.request_ids:
            active = self._active.get(request_id)
            if active is not None:
                self._end(active, "cancelled")

    def _drop(self, lost: Lost) -> None:
        """Forget attempts that count no more; a later one of the same request may run here already."""
        for request_id, attempt in lost.attempts.items():
            active = self._active.get(request_id)
            if active is not None and active.attempt == attempt:
                logger.warning("Attempt %d of request %s is no longer held; another follows.", attempt, request_id)
                self._forget(active)

    def _abandon(self, owner: str) -> None:
        """After a lost lease everything has gone back to the queue: start with nothing, under a new name."""
        if owner != self._lease.owner:
            return
        logger.error("The lease of %s was lost; its %d requests went back to the queue.", owner, len(self._active))
        for active in list(self._active.values()):
            self._forget(active)
        self._lease.replace()
        self._handover = Handover(self._lease.owner)

    def _take_claimed(self) -> None:
        """Admit what was claimed; a request that cannot run ends alone."""
        for active in self._intake.take():
            if active.owner != self._lease.owner:
                continue
            before = self._active.get(active.request.id)
            if before is not None:  # the lease ran out and came back with this claim before the heartbeat saw it
                self._forget(before)
            self._active[active.request.id] = active
            self._meters.queue_time.observe(active.claimed_s - active.request.arrival_s)
            try:
                self._admit(active)
            except RequestRefusedError as refusal:
                self._end(active, "error", refusal.code, refusal.message)

    def _send_again(self, active: ActiveRequest) -> None:
        """Send what the journal has of a request that another attempt began."""
        tokens = active.sequence.tokens[active.sequence.num_prompt_tokens :]
        self._handover.outputs.append(
            Output(active, 0, tokens, list(active.texts), journals=False, logprobs=active.logprobs)
        )

    def _end(self, active: ActiveRequest, reason: FinishReason, code: str = "", message: str = "") -> None:
        """Hand over a request's end, and forget it."""
        now_s = time.time()
        active.forget_unsent()
        finish = active.finish(reason, code, message)
        policy, revision = self._board.current_policy()
        event = active.event(finish, now_s=now_s, replica=self._lease.replica, policy=policy, revision=revision)
        outputs = self._handover.outputs
        if not (outputs and outputs[-1].active is active):
            outputs.append(Output(active, active.num_pushed, [], []))
        outputs[-1].finish, outputs[-1].event = finish, event
        self._meters.count_end(active, reason, now_s)
        if reason in ("stop", "length"):
            self._sizer.count_end(active, now_s)
        self._forget(active)

    def _forget(self, active: ActiveRequest) -> None:
        """It is held no more."""
        self._active.pop(active.request.id, None)

    def _note_drained(self) -> None:
        """While draining: where nothing is held, and what was given back is in the queue, the drain is over."""
        if not self._active:
            self._gate.emptied(is_delivered=self._intake.is_shut and not self._handover and self._outbox.is_clear)

    def _hand_over(self) -> None:
        """Give the step to the outbox. While that is full (Redis is slow or lost) wait, and obey commands meanwhile."""
        if not self._handover:
            return
        handover, self._handover = self._handover, Handover(self._lease.owner)
        while not self._outbox.offer(handover, OFFER_WAIT_S):
            self._heed(self._inbox.read())
            self._board.update(self._reporter, self._active.values())
            if self._gate.must_leave or handover.owner != self._lease.owner:
                return
