"""Ending requests dropped from a full queue for others: clients are told at once, tenants get back what was charged."""

import time
from typing import Any

import msgspec

from inference.messages import HISTORY_LENGTH, Finish, InferenceRequest, SequenceUpdate, unserved_event
from scheduling.fleet import FleetQueue
from scheduling.limits import TenantLimits
from scheduling.store import Command

CODE = "shed"
MESSAGE = "The queue is full, and requests of higher priority came; send the request again later."
MAX_REPLIES = 20_000
_encode = msgspec.msgpack.encode


def finish_of(request: InferenceRequest) -> Finish:
    """How a shed request ends: with an error, before its first token."""
    return Finish("error", len(request.prompt_token_ids), 0, error_code=CODE, error_message=MESSAGE)


def write_end(queue: FleetQueue, request: InferenceRequest) -> Command[bool]:
    """First: True for the one caller who goes on with `tell_end`."""
    return queue.end_shed(request.id, _encode(finish_of(request)))


def tell_end(queue: FleetQueue, request: InferenceRequest) -> list[Command[Any]]:
    """Tell the client's web process, give back the tenant's tokens and slot, write the history, count it."""
    keys = queue.keys
    end = unserved_event(request, state="failed", reason="error", now_s=time.time(), error_code=CODE)
    commands: list[Command[Any]] = [
        TenantLimits(keys).settle(request.tenant, request.id, refund_tokens=request.charged_tokens),
        _add(keys.history, HISTORY_LENGTH, _encode([end])),
        Command(("HINCRBY", keys.refusals, f"{request.model}|{request.tenant}|{CODE}", 1), int),
    ]
    if request.reply_to:
        update = SequenceUpdate(request.id, 0, 0, [], [], finish_of(request))
        commands.insert(0, _add(keys.replies(request.reply_to), MAX_REPLIES, _encode([update])))
    return commands


def _add(key: str, length: int, message: bytes) -> Command[bytes]:
    return Command(("XADD", key, "MAXLEN", "~", length, "*", "m", message), bytes)
