"""The loop of an upstream replica: claims as an engine does, forwards what it claimed, hands over what comes back."""

import logging
import time

from inference.upstream.client import NO_MODEL
from inference.upstream.errors import Busy, Silent, UpstreamError
from inference.upstream.forwarded import ForwardedRequest, check_forwarded
from inference.upstream.health import Health
from inference.upstream.slots import Slots
from inference.upstream.streams import Arrived, Ended, Probed, Streams
from inference.worker.active import MAX_FAILURES, ActiveRequest
from inference.worker.commands import Controls
from inference.worker.gate import Gate
from inference.worker.inbox import Inbox
from inference.worker.membership import Membership
from inference.worker.meters import Meters
from inference.worker.outbox import Output
from inference.worker.pipe import Pipe
from inference.worker.reporter import PERIOD_S, Reporter
from inference.worker.serving import ServingLoop
from inference.worker.sizer import Sizer
from inference.worker.status import StatusBoard
from scheduling.core.room import NO_ROOM, Room

logger = logging.getLogger(__name__)

MAX_TRIES = 10
"""Attempts of a request that an upstream which is away, or turns requests away, may cost."""
TURN_S = 0.004
"""A turn takes this long at least, so that the deltas of many answers share one."""
ANY_TOKENS = 2**31 - 1


class UpstreamLoop(ServingLoop):
    """Holds what is with the upstream. What a step is to an engine is here a turn in which tokens came."""

    def __init__(
        self,
        *,
        member: Membership,
        streams: Streams,
        slots: Slots,
        health: Health,
        reporter: Reporter,
        inbox: Inbox,
        pipe: Pipe,
        gate: Gate,
        controls: Controls,
        board: StatusBoard,
        meters: Meters,
        sizer: Sizer,
    ) -> None:
        super().__init__(
            lease=member.lease,
            intake=member.intake,
            outbox=member.outbox,
            reporter=reporter,
            inbox=inbox,
            pipe=pipe,
            gate=gate,
            controls=controls,
            board=board,
            meters=meters,
            sizer=sizer,
        )
        self._streams = streams
        self._slots = slots
        self._health = health
        slots.active = self._active
        self._sent_s: dict[ForwardedRequest, float] = {}
        """When each went out (monotonic)."""
        self._is_probing = False
        self._num_unknown = 0
        """How many requests in a row the upstream has turned away since it has no such model."""
        self._token_s = 0.0
        """When the last token of any answer came, and the usual time between two tokens of one."""
        self._gap_s = 0.0

    def run(self) -> None:
        """Forward until told to end. What is held then belongs to the caller to release."""
        while not self._gate.is_over:
            self._heed(self._inbox.read(PERIOD_S))
            started = time.monotonic()
            self._take_claimed()
            self._drain()
            self._sizer.tick()
            self._collect()
            self._look()
            self._hand_over()
            self._offer_room()
            self._board.update(self._reporter, self._active.values())
            if self._active:
                time.sleep(max(0.0, TURN_S - (time.monotonic() - started)))

    def _admit(self, active: ActiveRequest) -> None:
        """Send a request; one that was resumed tells its client again what the journal has."""
        assert isinstance(active, ForwardedRequest)
        check_forwarded(active)
        if active.num_resumed:
            self._send_again(active)
        active.mark("resumed" if active.num_resumed else "started", time.time())
        self._sent_s[active] = time.monotonic()
        self._streams.open(active)

    def _forget(self, active: ActiveRequest) -> None:
        super()._forget(active)
        assert isinstance(active, ForwardedRequest)
        if self._sent_s.pop(active, None) is not None:
            self._streams.cut(active)

    def _drain(self) -> None:
        """While draining, give back what still runs when the time is up."""
        if self._gate.state != "draining":
            return
        if self._gate.time_is_up:
            for active in list(self._active.values()):
                self._give_back(active)
        self._note_drained()

    def _give_back(self, active: ActiveRequest, *, failed: bool = False) -> None:
        (self._handover.failures if failed else self._handover.releases)[active.request.id] = active.attempt
        self._forget(active)

    def _collect(self) -> None:
        """Everything that came since the last turn. What was cut meanwhile counts no more."""
        gaps: list[float] = []
        num_prompt = num_tokens = 0
        for news in self._streams.take():
            match news:
                case Probed():
                    self._note_probe(news)
                case Arrived() if news.active in self._sent_s:
                    first = news.active.num_tokens == 0
                    num_tokens += self._receive(news, gaps)
                    num_prompt += news.active.prompt_tokens if first and news.active.num_tokens else 0
                case Ended() if news.active in self._sent_s:
                    num_tokens += self._conclude(news)
        if not num_tokens:
            return
        if gaps:
            self._gap_s = sum(gaps) / len(gaps)
        num_active = max(1, len(self._active))
        self._meters.count_step(
            batch_size=num_active, prompt_tokens=num_prompt, output_tokens=num_tokens, seconds=self._gap_s
        )

    def _receive(self, arrived: Arrived, gaps: list[float]) -> int:
        """Hand over a delta; how many tokens it counts for."""
        active, delta = arrived.active, arrived.delta
        if delta.usage is not None:
            active.usage = delta.usage
        if not delta.is_token:
            return 0
        self._token_s = arrived.time_s
        if active.last_token_s is None:
            self._note_first_token(active, arrived.time_s)
        else:
            gaps.append(arrived.time_s - active.last_token_s)
        active.last_token_s = arrived.time_s
        active.count_token(time.time())
        try:
            text = active.hear(delta.text)
        except UpstreamError as error:
            self._end(active, "error", error.code, str(error))
            return 1
        if text:
            start, numbers, texts = active.add(text)
            self._handover.outputs.append(Output(active, start, numbers, texts))
        return 1

    def _note_first_token(self, active: ForwardedRequest, time_s: float) -> None:
        sent_s = self._sent_s[active]
        self._health.note_token(sent_s)
        self._num_unknown = 0
        self._sizer.count_first_token(time_s - sent_s)
        if not active.num_resumed:
            self._meters.time_to_first_token.observe(time.time() - active.request.arrival_s)

    def _conclude(self, ended: Ended) -> int:
        """End a request, or give it back to be tried again; tokens that no delta was counted for."""
        active, error = ended.active, ended.error
        if error is None and not active.has_caught_up:
            message = "The upstream broke off within its answer, and gave a shorter one when it was asked again."
            self._end(active, "error", "upstream_interrupted", message)
            return 0
        if error is None:
            num_uncounted = max(0, active.num_new_tokens - active.num_tokens)
            self._end(active, "length" if ended.finish == "length" else "stop")
            return num_uncounted
        if error.is_refusal:
            if error.code == NO_MODEL:  # true of all that wait: one at a time has to find out, rather than all of them
                self._num_unknown += 1
                self._health.note_failure(str(error))
            self._end(active, "error", error.code, str(error))
            return 0
        logger.warning("Request %s was not answered: %s", active.request.id, error)
        self._health.note_failure(str(error), pause_s=error.retry_after_s)
        if isinstance(error, Busy | Silent):
            self._sizer.count_refusal()
        blamed = error.may_be_the_requests
        if active.failures + 1 >= MAX_FAILURES if blamed else active.attempt >= MAX_TRIES:
            self._end(active, "error", error.code, f"{error} It was tried {active.attempt} times.")
        else:
            self._give_back(active, failed=blamed)
        return 0

    def _look(self) -> None:
        """Ask the upstream, when it is time to, whether it serves."""
        if self._health.is_probe_due and not self._is_probing:
            self._is_probing = True
            self._streams.probe(lists_model=self._num_unknown > 1)

    def _note_probe(self, probed: Probed) -> None:
        """What a probe found; a token that came meanwhile is better proof than a list of models that did not."""
        self._is_probing = False
        if probed.error is None or self._token_s > probed.asked_s:
            self._health.note_probe()
        else:
            self._health.note_failure(str(probed.error), pause_s=probed.error.retry_after_s)

    def _offer_room(self) -> None:
        """Tell the intake what it may claim."""
        num = 0
        if self._gate.is_open:
            num = self._health.room(self._slots.batch_size, list(self._sent_s.values()))
        self._intake.offer(Room(num, ANY_TOKENS) if num else NO_ROOM, is_idle=not self._active)
