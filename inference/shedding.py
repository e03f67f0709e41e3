"""Ending requests that were dropped while they waited: clients are told at once, tenants get back what was charged."""

import logging
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import redis

from inference.messages import HISTORY_LENGTH, Finish, InferenceRequest, SequenceUpdate, unserved_event
from scheduling.core.answers import DropReason
from scheduling.fleet import FleetQueue, Shed
from scheduling.limits import TenantLimits
from scheduling.store import Command, execute, execute_many

logger = logging.getLogger(__name__)

MESSAGES: dict[DropReason, str] = {
    "shed": "The queue is full, and requests of higher priority came; send the request again later.",
    "deadline_exceeded": "The request's deadline passed while it waited.",
}
"""By reason, which is also the error's code."""
MAX_REPLIES = 20_000
_encode = msgspec.msgpack.encode


def finish_of(request: InferenceRequest, reason: DropReason) -> Finish:
    """How a dropped request ends: with an error, before its first token."""
    tokens = request.num_prompt_tokens
    return Finish("error", tokens, 0, error_code=reason, error_message=MESSAGES[reason])


def is_sent_again(request: InferenceRequest, error_code: str) -> bool:
    """Whether a request that ended so is sent again by whoever sent it: the history has how that ends."""
    return request.comes_again and error_code == "shed"


def write_end(queue: FleetQueue, request: InferenceRequest, reason: DropReason) -> Command[bool]:
    """First: True for the one caller who goes on with `tell_end`."""
    return queue.end_shed(request.id, _encode(finish_of(request, reason)))


def tell_end(queue: FleetQueue, request: InferenceRequest, reason: DropReason) -> list[Command[Any]]:
    """Tell the client's web process, give back the tenant's tokens and slot, write the history, count it."""
    keys = queue.keys
    commands: list[Command[Any]] = [
        TenantLimits(keys).settle(request.tenant, request.id, refund_tokens=request.charged_tokens),
        Command(("HINCRBY", keys.refusals, f"{request.model}|{request.tenant}|{reason}", 1), int),
    ]
    if not is_sent_again(request, reason):
        end = unserved_event(request, state="failed", reason="error", now_s=time.time(), error_code=reason)
        commands.append(add_message(keys.history, HISTORY_LENGTH, _encode([end])))
    if request.reply_to:
        update = SequenceUpdate(request.id, 0, 0, [], [], finish_of(request, reason))
        commands.insert(0, add_message(keys.replies(request.reply_to), MAX_REPLIES, _encode([update])))
    return commands


def end_dropped(client: redis.Redis, queue: FleetQueue, dropped: Iterable[Shed]) -> None:
    """All of it, for what a claim dropped. Raises RedisError; what is not ended then, the sweeper ends.

    One that another version wrote so that it cannot be read ends in its record alone; its slot is freed as a lost one.
    """
    for drop in dropped:
        try:
            request = msgspec.msgpack.decode(drop.body, type=InferenceRequest)
        except msgspec.MsgspecError as error:
            logger.error("Request %s was dropped (%s), and cannot be read: %s", drop.id, drop.reason, error)
            end = Finish("error", 0, 0, error_code=drop.reason, error_message=MESSAGES[drop.reason])
            execute(client, queue.end_shed(drop.id, _encode(end)))
            continue
        if execute(client, write_end(queue, request, drop.reason)):
            execute_many(client, tell_end(queue, request, drop.reason))


def add_message(key: str, length: int, message: bytes) -> Command[bytes]:
    """Put a message at the end of a stream that keeps about so many."""
    return Command(("XADD", key, "MAXLEN", "~", length, "*", "m", message), bytes)
