"""Log probabilities of output tokens, kept beside the journal so that a resumed or repaired answer has them all."""

import struct
from typing import Any

import msgspec

from scheduling.core.sequence import TokenLogprob
from scheduling.keys import Keys
from scheduling.store import Command

KEEP_S = 3600
"""How long they stay after the last token, while a request waits to be taken up again."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[TokenLogprob]).decode


def keep_logprobs(
    keys: Keys, model: str, request_id: str, start: int, logprobs: list[TokenLogprob]
) -> list[Command[Any]]:
    """Keep those of tokens `start` and following. Written before the journal, and the same whenever it is repeated."""
    key = keys.logprobs(model, request_id)
    return [
        Command(("HSET", key, struct.pack("<i", start), _encode(logprobs)), int),
        Command(("EXPIRE", key, KEEP_S), bool),
    ]


def expire_logprobs(keys: Keys, model: str, request_id: str, keep_s: int) -> Command[bool]:
    """Let them go with the record of a request that has ended."""
    return Command(("EXPIRE", keys.logprobs(model, request_id), keep_s), bool)


def read_logprobs(keys: Keys, model: str, request_id: str) -> Command[list[TokenLogprob]]:
    """Those of all tokens from 0 on, as far as none is missing."""
    return Command(("HGETALL", keys.logprobs(model, request_id)), _join)


def _join(reply: Any) -> list[TokenLogprob]:
    parts = dict(reply) if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
    joined: list[TokenLogprob] = []
    for start, part in sorted((struct.unpack("<i", start)[0], _decode(part)) for start, part in parts.items()):
        if start > len(joined):
            break
        joined[start:] = part  # what was written twice, in other portions, is the same
    return joined
