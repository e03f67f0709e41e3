"""Answers of OpenAI's dialect as bytes: whole, and as server-sent events whose constant parts are rendered once."""

from typing import Any

import msgspec

from inference.messages import Finish

encode = msgspec.json.encode
DONE = b"data: [DONE]\n\n"
SIGN_OF_LIFE = b": keep-alive\n\n"


def usage(finish: Finish) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "total_tokens": finish.prompt_tokens + finish.completion_tokens,
    }


class CompletionRendering:
    """Answers of `/v1/completions`."""

    object_whole = "text_completion"
    object_chunk = "text_completion"

    def __init__(self, *, id: str, created: int, model: str, include_usage: bool = False) -> None:
        self._base = {"id": id, "created": created, "model": model}
        self._include_usage = include_usage
        head = {"id": id, "object": self.object_chunk, "created": created, "model": model}
        self._head = b"data: " + encode(head)[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        before, after = self._choice("\0", None).split(b'"\\u0000"')
        self._text_head = self._head + b',"choices":[' + before
        self._text_tail = after + b"]" + self._tail

    def text(self, text: str) -> bytes:
        """A frame that carries text."""
        return self._text_head + encode(text) + self._text_tail

    def start(self) -> bytes:
        """The frame before the first text, where there is one."""
        return b""

    def end(self, finish: Finish) -> bytes:
        """The frames after the last text: finish reason, usage where asked for, the end mark."""
        last = self._head + b',"choices":[' + self._last_choice(finish) + b"]" + self._tail
        if not self._include_usage:
            return last + DONE
        return last + self._head + b',"choices":[],"usage":' + encode(usage(finish)) + b"}\n\n" + DONE

    def whole(self, text: str, finish: Finish) -> bytes:
        """The answer in one piece."""
        return encode(
            {
                **self._base,
                "object": self.object_whole,
                "choices": [self._whole_choice(text, finish.reason)],
                "usage": usage(finish),
            }
        )

    def _choice(self, text: str, reason: str | None) -> bytes:
        return encode({"index": 0, "text": text, "logprobs": None, "finish_reason": reason})

    def _last_choice(self, finish: Finish) -> bytes:
        return self._choice("", finish.reason)

    def _whole_choice(self, text: str, reason: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


class ChatRendering(CompletionRendering):
    """Answers of `/v1/chat/completions`."""

    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"

    def start(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._head + b',"choices":[' + self._delta(delta, None) + b"]" + self._tail

    def _choice(self, text: str, reason: str | None) -> bytes:
        return self._delta({"content": text}, reason)

    def _last_choice(self, finish: Finish) -> bytes:
        return self._delta({}, finish.reason)

    def _delta(self, delta: dict[str, str], reason: str | None) -> bytes:
        return encode({"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason})

    def _whole_choice(self, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}


def error_frame(body: bytes) -> bytes:
    """An error after the stream began."""
    return b"data: " + body + b"\n\n"
