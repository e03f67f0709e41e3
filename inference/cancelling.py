"""What is owed once a waiting request was cancelled: its client's end, its tenant's charge, its history."""

import time
from typing import Any

import msgspec

from inference.messages import HISTORY_LENGTH, Finish, InferenceRequest, SequenceUpdate, unserved_event
from inference.shedding import MAX_REPLIES, add_message
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import Command

_encode = msgspec.msgpack.encode


def settle_cancelled(keys: Keys, request: InferenceRequest, *, withdrawn: bool = False) -> Command[None]:
    """Give back its tokens and slot. One that is `withdrawn` does not count against requests a minute either."""
    limits, tokens = TenantLimits(keys), request.charged_tokens
    if withdrawn:
        return limits.cancel_charge(request.tenant, request.id, tokens=tokens)
    return limits.settle(request.tenant, request.id, refund_tokens=tokens)


def end_cancelled(
    keys: Keys, request: InferenceRequest, *, attempt: int | None, error_code: str = "", withdrawn: bool = False
) -> list[Command[Any]]:
    """All of it, for whoever took a request out of the queue; it may be repeated.

    `attempt` is the last that a worker made: its web process hears of no older one. None where the client is gone.
    """
    event = unserved_event(request, state="cancelled", reason="cancelled", now_s=time.time(), error_code=error_code)
    commands: list[Command[Any]] = [
        settle_cancelled(keys, request, withdrawn=withdrawn),
        add_message(keys.history, HISTORY_LENGTH, _encode([event])),
    ]
    if attempt is not None and request.reply_to:
        update = SequenceUpdate(request.id, attempt, 0, [], [], finish_cancelled(request))
        commands.insert(0, add_message(keys.replies(request.reply_to), MAX_REPLIES, _encode([update])))
    return commands


def finish_cancelled(request: InferenceRequest, num_tokens: int = 0) -> Finish:
    """How it ends: after as many tokens as attempts before had made."""
    return Finish("cancelled", request.num_prompt_tokens, num_tokens)
