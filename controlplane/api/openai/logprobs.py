"""Log probabilities in OpenAI's shapes, each given with the text that its token is part of."""

import codecs
from collections import deque
from dataclasses import dataclass
from typing import Any

from inference.tokenization import Tokenizer
from scheduling.core.sequence import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token of the answer's text, which begins at character `offset` of it."""

    piece: bytes
    offset: int
    measured: TokenLogprob


class TokenTrail:
    """Holds tokens back until the text that they begin in has been given out.

    Text comes later than its tokens where a character or a possible stop string is incomplete, and not at all after a
    stop string: tokens of such text are never shown, nor are those that give no text.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._silent = tokenizer.silent_token_ids(sampling)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: deque[ShownToken] = deque()
        self._is_first = True
        self._num_read = 0
        """Characters of all tokens so far."""
        self._num_given = 0
        """Characters of text that was given out."""

    def push(self, measured: list[TokenLogprob]) -> None:
        """Take the next tokens."""
        for one in measured:
            if one.token_id in self._silent:
                continue
            piece = self._tokenizer.token_bytes(one.token_id, is_first=self._is_first)
            self._is_first = False
            self._waiting.append(ShownToken(piece, self._num_read, one))
            self._num_read += len(self._decoder.decode(piece))

    def take(self, text: str) -> list[ShownToken]:
        """The tokens that begin in a text which is given out now, or began before it and are not shown yet."""
        self._num_given += len(text)
        shown = []
        while self._waiting and self._waiting[0].offset < self._num_given:
            shown.append(self._waiting.popleft())
        return shown

    def show_chat(self, shown: list[ShownToken]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat."""
        content = []
        for token in shown:
            top = [self._entry(token_id, logprob) for token_id, logprob in token.measured.top]
            content.append({**_entry_of(token.piece, token.measured.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def show_completion(self, shown: list[ShownToken]) -> dict[str, Any]:
        """`choices[].logprobs` of a completion; beside the likeliest tokens stands the chosen one."""
        return {
            "text_offset": [token.offset for token in shown],
            "token_logprobs": [_finite(token.measured.logprob) for token in shown],
            "tokens": [_name_of(token.piece) for token in shown],
            "top_logprobs": [self._top(token) for token in shown],
        }

    def _top(self, token: ShownToken) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in token.measured.top:
            top.setdefault(_name_of(self._tokenizer.token_bytes(token_id)), _finite(logprob))
        top.setdefault(_name_of(token.piece), _finite(token.measured.logprob))
        return top

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return _entry_of(self._tokenizer.token_bytes(token_id), logprob)


LEAST = -9999.0
"""What OpenAI gives for a token that is as good as impossible; JSON has no infinity."""


def _finite(logprob: float) -> float:
    return max(LEAST, logprob)


def _entry_of(piece: bytes, logprob: float) -> dict[str, Any]:
    text = piece.decode("utf-8", "backslashreplace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(piece)}


def _name_of(piece: bytes) -> str:
    """A token's text, or its bytes where they are no whole characters, written as OpenAI writes them."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
