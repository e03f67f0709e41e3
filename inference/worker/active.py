"""A request while an engine process holds it: its sequence, its text so far, and when what happened."""

from collections.abc import Callable

import msgspec

from inference.messages import Finish, FinishReason, InferenceRequest, MarkKind, RequestEvent, Slot, State
from inference.tokenization import Characters, TextStream
from inference.worker.timeline import Timeline
from scheduling.core.answers import ClaimedRequest
from scheduling.core.request import Priority
from scheduling.core.sequence import SamplingParams, Sequence, TokenLogprob

MAX_FAILURES = 3
"""A request that so many engine processes ended over, other than in good order, has probably ended them."""
STATES: dict[FinishReason, State] = {
    "stop": "finished",
    "length": "finished",
    "cancelled": "cancelled",
    "error": "failed",
}

_decoder = msgspec.msgpack.Decoder(InferenceRequest)


class RequestRefusedError(Exception):
    """The engine cannot run this request; others are not concerned."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ActiveRequest:
    """Created when the loop takes a claimed request; belongs to the loop's thread until it is ended."""

    def __init__(
        self,
        request: InferenceRequest,
        claimed: ClaimedRequest,
        stream: TextStream | Characters,
        *,
        owner: str,
        now_s: float,
    ) -> None:
        self.request = request
        self.owner = owner
        self.attempt = claimed.attempt
        self.failures = claimed.failures
        self.stream = stream
        self.claimed_s = now_s
        self.first_token_s: float | None = None
        self.timeline = Timeline(request.arrival_s)
        self.texts: list[str] = []
        self.num_resumed = len(claimed.tokens)
        """Output tokens that an earlier attempt journalled."""
        self.sequence = Sequence(
            id=request.id,
            attempt=claimed.attempt,
            tenant=request.tenant,
            priority=request.priority,
            arrival_s=request.arrival_s,
            tokens=[*request.prompt_token_ids, *claimed.tokens],
            num_prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            failures=claimed.failures,
        )
        self.logprobs: list[TokenLogprob] = []
        """Of the resumed tokens, where the request asks for them."""
        self.num_pushed = 0
        """Output tokens whose text was made."""
        for token_id in claimed.tokens:
            self._push(token_id)

    def push(self, token_id: int, now_s: float) -> str:
        """Note a new token, which the sequence has already; returns the text that may be sent with it."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.timeline.count_token(now_s)
        return self._push(token_id)

    def _push(self, token_id: int) -> str:
        text = self.stream.push(token_id)
        self.texts.append(text)
        self.num_pushed += 1
        return text

    def mark(self, kind: MarkKind, now_s: float) -> None:
        """Note a turn of its life."""
        self.timeline.mark(kind, now_s, self.sequence.num_output_tokens)

    def forget_unsent(self) -> None:
        """Drop the tokens after the one that ended the request, which a step with a draft may have brought."""
        del self.sequence.tokens[self.sequence.num_prompt_tokens + self.num_pushed :]

    def finish(self, reason: FinishReason, error_code: str = "", error_message: str = "") -> Finish:
        """How the request ends; lets go the text that was held back."""
        held = self.stream.finish() if reason != "error" else ""
        self.texts.append(held)
        return Finish(
            reason=reason,
            prompt_tokens=self.sequence.num_prompt_tokens,
            completion_tokens=self.sequence.num_output_tokens,
            text=held,
            error_code=error_code,
            error_message=error_message,
        )

    @property
    def output(self) -> str:
        """The text so far; all of it once finished."""
        return "".join(self.texts)

    @property
    def num_new_tokens(self) -> int:
        """Output tokens of this attempt."""
        return self.sequence.num_output_tokens - self.num_resumed

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, as far as it is known by now."""
        return self.sequence.num_prompt_tokens

    @property
    def used_tokens(self) -> int:
        return len(self.sequence.tokens)

    def slot(self) -> Slot:
        """The request as the dashboard shows it."""
        sequence = self.sequence
        return Slot(
            request_id=sequence.id,
            tenant=sequence.tenant,
            priority=sequence.priority,
            prompt_tokens=sequence.num_prompt_tokens,
            output_tokens=sequence.num_output_tokens,
            max_tokens=sequence.max_tokens,
            claimed_ms=self.timeline.since_ms(self.claimed_s),
            first_token_ms=None if self.first_token_s is None else self.timeline.since_ms(self.first_token_s),
            marks=list(self.timeline.marks),
        )

    def event(self, finish: Finish, *, now_s: float, replica: str, policy: str, revision: int) -> RequestEvent:
        """The request's end, for the historian.

        The time of the first token is unknown, and therefore None, where another engine process sent it.
        """
        request = self.request
        return RequestEvent(
            id=request.id,
            model=request.model,
            tenant=request.tenant,
            priority=request.priority,
            endpoint=request.endpoint,
            state=STATES[finish.reason],
            finish_reason=finish.reason,
            error_code=finish.error_code,
            arrival_s=request.arrival_s,
            claimed_s=self.claimed_s,
            first_token_s=None if self.num_resumed else self.first_token_s,
            finished_s=now_s,
            prompt_tokens=finish.prompt_tokens,
            completion_tokens=finish.completion_tokens,
            max_tokens=request.max_tokens,
            attempts=self.attempt,
            replica=replica,
            policy=policy,
            policy_revision=revision,
            deadline_s=request.deadline_s,
            user=request.user,
            traceparent=request.traceparent,
            marks=self.timeline.marks,
            bursts=self.timeline.bursts(),
            burst_ms=self.timeline.span_ms,
        )


def open_request(
    claimed: ClaimedRequest,
    *,
    owner: str,
    model: str,
    new_stream: Callable[[SamplingParams], TextStream],
    now_s: float,
) -> ActiveRequest:
    """What a claim gave, to be run here."""
    request = read_request(claimed, model=model, now_s=now_s)
    return ActiveRequest(request, claimed, new_stream(request.sampling), owner=owner, now_s=now_s)


def read_request(claimed: ClaimedRequest, *, model: str, now_s: float) -> InferenceRequest:
    """A claimed request's body. One that cannot be read stands in with nothing but its id, and its tenant unknown."""
    try:
        return _decoder.decode(claimed.body)
    except msgspec.MsgspecError:
        return InferenceRequest(
            id=claimed.id,
            model=model,
            tenant="",
            priority=Priority.BULK,
            arrival_s=now_s,
            prompt_token_ids=[],
            max_tokens=0,
            sampling=SamplingParams(),
        )


def check_readable(request: InferenceRequest) -> None:
    """Raise RequestRefusedError for one that stands in for what could not be read."""
    if not request.tenant:
        raise RequestRefusedError("bad_request", "The stored request cannot be read by this version of the engine.")


def check_request(active: ActiveRequest, *, vocab_size: int) -> None:
    """Raise RequestRefusedError for what would fail in the model, or has ended engine processes before."""
    request = active.request
    check_readable(request)
    if active.failures >= MAX_FAILURES:
        raise RequestRefusedError(
            "too_many_attempts",
            f"The request was given up after {MAX_FAILURES} engine processes ended while they ran it.",
        )
    if not request.prompt_token_ids or request.max_tokens < 1:
        raise RequestRefusedError("bad_request", "A prompt and max_tokens of at least one token are needed.")
    if request.sampling.logprobs is not None and len(active.logprobs) < active.num_resumed:
        raise RequestRefusedError(
            "engine_error", "The log probabilities of tokens before the engine's restart were lost; send it again."
        )
    if min(active.sequence.tokens) < 0 or max(active.sequence.tokens) >= vocab_size:
        raise RequestRefusedError("bad_request", f"The prompt has a token id outside the vocabulary of {vocab_size}.")
    # Was checked for the model of its time; on a GPU such an id would end the device's work for everybody.
    named = [token_id for token_id, _ in request.sampling.logit_bias] + list(request.sampling.stop_token_ids)
    if named and not 0 <= min(named) <= max(named) < vocab_size:
        raise RequestRefusedError("bad_request", f"An option names a token id outside the vocabulary of {vocab_size}.")
