"""Idempotency keys: which request a tenant's key stands for, kept in Redis so that any web process finds it."""

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from inference.gateway.admission import REDIS_WAIT_S, Draft
from inference.gateway.errors import GatewayError, IdempotencyKeyReused, InvalidRequest, RedisUnavailable
from inference.gateway.pipeline import CommandPipeline
from inference.gateway.reply import Reply
from inference.gateway.served import ServedModel
from scheduling.fleet import RequestRecordView
from scheduling.keys import Keys
from scheduling.store import Command, load_script

MAX_LENGTH = 255
LIFE_S = 24 * 3600
"""How long a key is known at most; it stands for its request while that has a record, which goes before."""
ABANDONED_S = 10.0
"""A key that has no request after this belongs to a web process that died while it let the request in."""
LOOK_AGAIN_S = 0.02
_PRINTABLE = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_LENGTH)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A client's key, and what its request asks for; both as digests, so that their length is bounded."""

    digest: str
    fingerprint: str


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What Redis keeps under a key: the request's fingerprint and id, and when (unix seconds) it was claimed."""

    fingerprint: str
    request_id: str
    claimed_s: float

    @property
    def is_abandoned(self) -> bool:
        """Whether its request, if there is none yet, will not come."""
        return abs(time.time() - self.claimed_s) > ABANDONED_S


def read_key(header: bytes, face: str, asked: object) -> IdempotencyKey:
    """The key of a header. `face` names the address and `asked` (any struct) the body. Raises InvalidRequest."""
    if not _PRINTABLE.fullmatch(header):
        raise InvalidRequest(
            f"Idempotency-Key must have 1 to {MAX_LENGTH} printable ASCII characters without spaces.",
            param="Idempotency-Key",
            code="invalid_idempotency_key",
        )
    return IdempotencyKey(_digest(header), _digest(face.encode() + b"\0" + msgspec.msgpack.encode(asked)))


class OnceDesk:
    """Lets the first request of a key in, and gives all others the same.

    The key is claimed before admission and given back where that refuses, so nothing is charged or queued twice. A key
    stands for its request until that failed, was cancelled or is forgotten; then the next one runs anew.
    """

    def __init__(
        self,
        pipeline: CommandPipeline,
        keys: Keys,
        *,
        admit: Callable[[Draft], Awaitable[Reply]],
        follow: Callable[[ServedModel, RequestRecordView], Awaitable[Reply]],
    ) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._admit = admit
        self._follow = follow

    async def submit(self, draft: Draft, key: IdempotencyKey) -> Reply:
        """Raises IdempotencyKeyReused for another body, and what admission raises."""
        expected, mine = b"", b""
        while True:
            mine = mine or _encode(Claim(key.fingerprint, draft.id, time.time()))
            found = await self._swap(draft, key, expected, mine)
            claim = _decode(found) if found else None
            if claim is None or claim.request_id == draft.id:  # the latter: our own, sent again after a lost reply
                return await self._admit_first(draft, key, mine)
            if claim.fingerprint != key.fingerprint:
                raise IdempotencyKeyReused(param="Idempotency-Key")
            record = await self._pipeline.send_within(draft.model.queue.record(claim.request_id), REDIS_WAIT_S)
            if record is not None and record.state not in ("failed", "cancelled"):
                return await self._follow(draft.model, record)
            if record is None and not claim.is_abandoned:  # it is being let in at this moment
                await asyncio.sleep(LOOK_AGAIN_S)
                expected = b""
            else:
                expected = found

    async def _admit_first(self, draft: Draft, key: IdempotencyKey, mine: bytes) -> Reply:
        try:
            return await self._admit(draft)
        except GatewayError:
            with contextlib.suppress(RedisUnavailable):  # then the key is taken for abandoned after a while
                await self._swap(draft, key, mine, b"")
            raise

    async def _swap(self, draft: Draft, key: IdempotencyKey, expected: bytes, new: bytes) -> bytes:
        """Replace what stands under a key (`b""`: nothing) if it is as expected; answers `b""`, or what it is."""
        args = (self._keys.tenant(draft.tenant.name), f"key:{key.digest}", expected, new, LIFE_S)
        return await self._pipeline.send_within(Command(args, bytes, load_script("swap"), 1), REDIS_WAIT_S)


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:40]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Claim).decode
