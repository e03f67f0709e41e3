"""Answers of OpenAI's dialect as bytes: whole, and as server-sent events whose constant parts are rendered once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from controlplane.api.openai.logprobs import TokenTrail
from inference.messages import Finish
from scheduling.core.sequence import TokenLogprob

encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
SIGN_OF_LIFE = b": keep-alive\n\n"


def usage(finishes: Sequence[Finish]) -> dict[str, int]:
    """OpenAI's usage object: the prompt, which is the same for all answers, once, and the tokens of all answers."""
    prompt, completion = finishes[0].prompt_tokens, sum(finish.completion_tokens for finish in finishes)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What all parts of an answer begin with."""

    id: str
    created: int
    model: str
    include_usage: bool = False


class CompletionRendering:
    """One of a request's answers as `/v1/completions` shows it; with a `trail` it shows log probabilities."""

    object_whole = "text_completion"
    object_chunk = "text_completion"

    def __init__(self, heading: Heading, index: int = 0, trail: TokenTrail | None = None) -> None:
        self._index = index
        self._trail = trail
        self._heading = heading
        self._head = b"data: " + encode(_describe(heading, self.object_chunk))[:-1]
        self._tail = b',"usage":null}\n\n' if heading.include_usage else b"}\n\n"
        before, after = encode(self._chunk("\0", None, None)).split(b'"\\u0000"')
        self._text_head = self._head + b',"choices":[' + before
        self._text_tail = after + b"]" + self._tail

    def start(self) -> bytes:
        """The frame before the first text, where there is one."""
        return b""

    def text(self, text: str, measured: list[TokenLogprob]) -> bytes:
        """A frame that carries text, with the log probabilities of its tokens; nothing where there is no text."""
        logprobs = self._follow(text, measured)
        if not text:
            return b""
        if logprobs is None:
            return self._text_head + encode(text) + self._text_tail
        return self._frame(self._chunk(text, None, logprobs))

    def last(self, finish: Finish) -> bytes:
        """The frame after the last text, with the finish reason."""
        return self._frame(self._last_chunk(finish.reason))

    def whole(self, text: str, measured: list[TokenLogprob], finish: Finish) -> dict[str, Any]:
        """The answer in one piece, for `render_whole`."""
        return self._whole_choice(text, finish.reason, self._follow(text, measured))

    def _follow(self, text: str, measured: list[TokenLogprob]) -> dict[str, Any] | None:
        if self._trail is None:
            return None
        self._trail.push(measured)
        return self._show(self._trail.take(text))

    def _frame(self, choice: dict[str, Any]) -> bytes:
        return self._head + b',"choices":[' + encode(choice) + b"]" + self._tail

    def _show(self, shown: Any) -> dict[str, Any]:
        assert self._trail is not None
        return self._trail.show_completion(shown)

    def _chunk(self, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _last_chunk(self, reason: str) -> dict[str, Any]:
        return self._chunk("", reason, None)

    def _whole_choice(self, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return self._chunk(text, reason, logprobs)


class ChatRendering(CompletionRendering):
    """One answer as `/v1/chat/completions` shows it."""

    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def start(self) -> bytes:
        return self._frame(self._delta({"role": "assistant", "content": ""}, None, None))

    def _show(self, shown: Any) -> dict[str, Any]:
        assert self._trail is not None
        return self._trail.show_chat(shown)

    def _chunk(self, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return self._delta({"content": text}, reason, logprobs)

    def _last_chunk(self, reason: str) -> dict[str, Any]:
        return self._delta({}, reason, None)

    def _delta(self, delta: dict[str, str], reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _whole_choice(self, text: str, reason: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def render_whole(
    heading: Heading, kind: type[CompletionRendering], choices: Sequence[dict[str, Any]], finishes: Sequence[Finish]
) -> bytes:
    """All answers in one piece."""
    return encode({**_describe(heading, kind.object_whole), "choices": choices, "usage": usage(finishes)})


def render_end(heading: Heading, kind: type[CompletionRendering], finishes: Sequence[Finish]) -> bytes:
    """The frames after all answers: usage where asked for, the end mark."""
    if not heading.include_usage:
        return DONE
    last = {**_describe(heading, kind.object_chunk), "choices": [], "usage": usage(finishes)}
    return b"data: " + encode(last) + b"\n\n" + DONE


def error_frame(body: bytes) -> bytes:
    """An error after the stream began."""
    return b"data: " + body + b"\n\n"


def _describe(heading: Heading, kind: str) -> dict[str, Any]:
    return {"id": heading.id, "object": kind, "created": heading.created, "model": heading.model}
