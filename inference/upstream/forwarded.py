"""A request while an upstream server answers it."""

import msgspec

from inference.messages import Finish, FinishReason, InferenceRequest, MarkKind, Slot
from inference.tokenization import Characters
from inference.upstream.errors import BrokenOff, TooLong
from inference.upstream.events import Usage
from inference.worker.active import MAX_FAILURES, ActiveRequest, RequestRefusedError, check_readable
from scheduling.core.answers import ClaimedRequest

CHARACTERS_PER_TOKEN = 4
"""About; what the upstream has counted replaces the guess."""
MAX_CHARACTERS = 2**20
"""Of an answer; the journal takes four bytes for each."""
MAX_CHARACTERS_PER_TOKEN = 256


class ForwardedRequest(ActiveRequest):
    """An active request whose `tokens` are the characters of its answer: an upstream names no token ids.

    Where an earlier attempt has sent a part of the answer, this one's must begin with the same characters; so it goes
    on exactly, or not at all.
    """

    def __init__(self, request: InferenceRequest, claimed: ClaimedRequest, *, owner: str, now_s: float) -> None:
        super().__init__(request, claimed, Characters(), owner=owner, now_s=now_s)
        self.num_tokens = 0
        """Output tokens of this attempt, as counted by the deltas that came."""
        self.usage: Usage | None = None
        self.last_token_s: float | None = None
        """When the last delta came (monotonic)."""
        self._sent = self.output
        self._num_heard = 0
        """Characters of this attempt."""

    def hear(self, text: str) -> str:
        """The part of a new piece of the answer that was not sent before.

        Raises BrokenOff where it is another answer than the one that was begun, TooLong where it does not end.
        """
        known = self._sent[self._num_heard : self._num_heard + len(text)]
        if text[: len(known)] != known:
            raise BrokenOff("The upstream broke off within its answer, and gave another one when it was asked again.")
        self._num_heard += len(text)
        if self._num_heard > min(MAX_CHARACTERS, MAX_CHARACTERS_PER_TOKEN * self.request.max_tokens):
            raise TooLong(f"The upstream sent far more than the {self.request.max_tokens} tokens that were asked for.")
        return text[len(known) :]

    @property
    def has_caught_up(self) -> bool:
        """Whether this attempt has given all that was sent before."""
        return self._num_heard >= len(self._sent)

    def add(self, text: str) -> tuple[int, list[int], list[str]]:
        """Note new text; the number of its first character, and the characters as numbers and as texts."""
        start, numbers, texts = self.num_pushed, [ord(character) for character in text], list(text)
        self.sequence.tokens += numbers
        self.texts += texts
        self.num_pushed += len(texts)
        return start, numbers, texts

    def count_token(self, now_s: float) -> None:
        """A token came, of text or of reasoning that nobody sees. Unix seconds."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.num_tokens += 1
        self.sequence.num_computed = self.prompt_tokens + self.num_tokens
        self.timeline.count_token(now_s)

    def mark(self, kind: MarkKind, now_s: float) -> None:
        self.timeline.mark(kind, now_s, self.completion_tokens)

    def finish(self, reason: FinishReason, error_code: str = "", error_message: str = "") -> Finish:
        return Finish(
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            error_code=error_code,
            error_message=error_message,
        )

    @property
    def prompt_tokens(self) -> int:
        """As the upstream counted them, or as they were counted or guessed when the request came."""
        return self.usage.prompt_tokens if self.usage else self.request.num_prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Of the whole answer: as the upstream counted them, or by what came."""
        if self.usage is not None:
            return self.usage.completion_tokens
        return self.num_tokens if self.has_caught_up else -(-len(self._sent) // CHARACTERS_PER_TOKEN)

    @property
    def num_new_tokens(self) -> int:
        return self.completion_tokens if self.usage and not self.num_resumed else self.num_tokens

    @property
    def used_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def slot(self) -> Slot:
        return msgspec.structs.replace(
            super().slot(), prompt_tokens=self.prompt_tokens, output_tokens=self.completion_tokens
        )

    def body(self, model: str) -> bytes:
        """What the upstream is sent. A seed always, so that an answer that broke off can be told from another one."""
        fields = msgspec.json.decode(self.request.forwarded)
        fields |= {
            "model": model,
            "max_tokens": self.request.max_tokens,
            "seed": self.request.sampling.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(fields)


def check_forwarded(active: ForwardedRequest) -> None:
    """Raise RequestRefusedError for what cannot be forwarded, or was tried too often."""
    check_readable(active.request)
    if not active.request.forwarded:
        raise RequestRefusedError(
            "engine_error", "The model was moved to another server after the request came; send it again."
        )
    if active.failures >= MAX_FAILURES:
        raise RequestRefusedError(
            "too_many_attempts", f"The request was given up after {MAX_FAILURES} workers or servers failed over it."
        )
