"""Cancelling a request for an operator: wherever it is, its client is told, its tenant settled, the trail written."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from django.contrib.auth.models import User

from inference.messages import HISTORY_LENGTH, Finish, InferenceRequest, SequenceUpdate, unserved_event
from inference.shedding import MAX_REPLIES
from scheduling.audit import record_action
from scheduling.connection import live_keys, live_redis
from scheduling.fleet import FleetQueue
from scheduling.limits import TenantLimits
from scheduling.store import Command, execute, execute_many

CODE = "cancelled_by_operator"
_encode = msgspec.msgpack.encode


def cancel_request(*, request_id: str, models: Sequence[str], actor: User, reason: str) -> str:
    """Where the request was: "queued" (it is over), "running" (its worker ends it at the next step) or "gone".

    Raises RedisError or OSError; the same call may be repeated.
    """
    client = live_redis()
    for queue in (FleetQueue(live_keys(), model) for model in models):
        was, record = execute_many(client, [queue.cancel(request_id), queue.record(request_id)])
        if record is None:
            continue
        request = msgspec.msgpack.decode(record.body, type=InferenceRequest)
        status: str = was.status
        if status == "gone":
            # Its end is still owed where a call before this one took it out of the queue, and broke off.
            owed = record.state == "cancelled" and record.finish is None
            if not owed or not execute(client, TenantLimits(queue.keys).holds(request.tenant, request_id)):
                continue
            status = "queued"
        if status == "queued":
            execute_many(client, _end(queue, request, attempt=record.attempt))
        after = {"was": status, "model": queue.model, "tenant": request.tenant}
        record_action(actor=actor, action="request.cancel", target=request_id, after=after, reason=reason)
        return status
    return "gone"


def _end(queue: FleetQueue, request: InferenceRequest, *, attempt: int) -> list[Command[Any]]:
    """What the web process of a client that went away would do, and the client's own end.

    `attempt` is the last that a worker made: its web process hears of no older one.
    """
    keys, finish = queue.keys, Finish("cancelled", request.num_prompt_tokens, 0)
    event = unserved_event(request, state="cancelled", reason="cancelled", now_s=time.time(), error_code=CODE)
    commands: list[Command[Any]] = [
        TenantLimits(keys).settle(request.tenant, request.id, refund_tokens=request.charged_tokens),
        _add(keys.history, HISTORY_LENGTH, _encode([event])),
    ]
    if request.reply_to:
        update = SequenceUpdate(request.id, attempt, 0, [], [], finish)
        commands.insert(0, _add(keys.replies(request.reply_to), MAX_REPLIES, _encode([update])))
    return commands


def _add(key: str, length: int, message: bytes) -> Command[Any]:
    return Command(("XADD", key, "MAXLEN", "~", length, "*", "m", message), bytes)
