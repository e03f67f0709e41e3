"""Server-sent events out of bytes, and what OpenAI's dialect says in them."""

from typing import Any

import msgspec

from inference.upstream.errors import Failed, clean

MAX_EVENT_BYTES = 2**20
"""Of one event with its lines; an upstream that sends more is not listened to any further."""
MAX_COUNT = 2**31 - 1


class EventReader:
    """Takes bytes as they come and gives the data of each complete event.

    A line is decoded when it is whole, so no border between two pieces cuts a character. Comments, names and numbers
    of events are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._after_return = False
        self._data: list[bytes] = []
        self._num_bytes = 0

    def push(self, piece: bytes) -> list[bytes]:
        """The data of the events that end in this piece. Raises Failed for an event without an end."""
        if self._after_return and piece.startswith(b"\n"):  # the other half of a line's end
            piece = piece[1:]
        self._after_return = piece.endswith(b"\r") if piece else self._after_return
        *lines, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                self._data, self._num_bytes = [], 0
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._num_bytes += len(line) + 1
        if self._num_bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise Failed(f"The upstream sent an event of more than {MAX_EVENT_BYTES} bytes.")
        return events


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the upstream counts them."""

    prompt_tokens: int
    completion_tokens: int


class Delta(msgspec.Struct, frozen=True):
    """What one event brought. `is_token`: it counts as a token, though its text may not be shown (reasoning)."""

    text: str = ""
    is_token: bool = False
    finish: str = ""
    usage: Usage | None = None


def read_event(data: bytes, *, secret: str = "") -> Delta | None:
    """The delta of an event; None for the end mark. Raises Failed for an error, and for what is no such event."""
    if data.strip() == b"[DONE]":
        return None
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Failed("The upstream sent an event that is no JSON.") from error
    if not isinstance(fields, dict):
        raise Failed("The upstream sent an event that is no JSON object.")
    if problem := fields.get("error"):
        words = problem.get("message") if isinstance(problem, dict) else problem
        said = clean(words, secret=secret) if isinstance(words, str) else ""
        raise Failed(f"The upstream failed within its answer: {said}" if said else "The upstream failed in its answer.")
    choices = fields.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    text, is_token = _read_text(choice)
    finish = choice.get("finish_reason")
    return Delta(text, is_token, finish if isinstance(finish, str) else "", _read_usage(fields.get("usage")))


def _read_text(choice: dict[str, Any]) -> tuple[str, bool]:
    """The text of a choice of either endpoint, and whether anything was generated."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        text = choice.get("text")
        return (text, bool(text)) if isinstance(text, str) else ("", False)
    text = delta.get("content")
    thought = any(isinstance(delta.get(name), str) and delta[name] for name in ("reasoning_content", "reasoning"))
    return (text, bool(text) or thought) if isinstance(text, str) else ("", thought)


def _read_usage(fields: Any) -> Usage | None:
    if not isinstance(fields, dict):
        return None
    counts = [fields.get("prompt_tokens"), fields.get("completion_tokens")]
    if any(isinstance(num, bool) or not isinstance(num, int) or not 0 <= num <= MAX_COUNT for num in counts):
        return None
    return Usage(*counts)  # type: ignore[arg-type]
