"""Cancelling a request for an operator: wherever it is, its client is told, its tenant settled, the trail written."""

from collections.abc import Sequence

import msgspec
from django.contrib.auth.models import User

from inference.cancelling import end_cancelled
from inference.messages import InferenceRequest
from scheduling.audit import record_action
from scheduling.connection import live_keys, live_redis
from scheduling.fleet import FleetQueue
from scheduling.limits import TenantLimits
from scheduling.store import execute, execute_many

CODE = "cancelled_by_operator"


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
            execute_many(client, end_cancelled(queue.keys, request, attempt=record.attempt, error_code=CODE))
        after = {"was": status, "model": queue.model, "tenant": request.tenant}
        record_action(actor=actor, action="request.cancel", target=request_id, after=after, reason=reason)
        return status
    return "gone"
