"""Cancelling a request for an operator: wherever it is, its client is told, its tenant settled, the trail written."""

from collections.abc import Sequence

import msgspec
import redis
from django.contrib.auth.models import User

from inference.cancelling import end_cancelled
from inference.messages import InferenceRequest
from scheduling.audit import record_action
from scheduling.connection import live_keys, live_redis
from scheduling.fleet import FleetQueue, RequestRecordView
from scheduling.limits import TenantLimits
from scheduling.store import execute, execute_many

CODE = "cancelled_by_operator"


def cancel_request(*, request_id: str, models: Sequence[str], actor: User, reason: str) -> str:
    """Where the request was: "queued" (it is over), "running" (its worker ends it at the next step) or "gone".

    "cancelling": it runs, and a cancelling of it is on its way to its worker already, so nothing is done. Else it is in
    the audit trail before anything is done, since nothing takes a cancelling back. Raises DatabaseError (then nothing
    was done), RedisError or OSError; the same call may be repeated.
    """
    client = live_redis()
    for queue in (FleetQueue(live_keys(), model) for model in models):
        record = execute(client, queue.record(request_id))
        if record is None:
            continue
        request = msgspec.msgpack.decode(record.body, type=InferenceRequest)
        if record.state not in ("queued", "running") and not _is_owed(client, queue, request, record):
            continue
        if record.state == "running" and execute(client, queue.is_cancelling(request_id)):
            return "cancelling"
        before = {"state": record.state}
        after = {"state": "cancelled", "model": queue.model, "tenant": request.tenant}
        record_action(
            actor=actor, action="request.cancel", target=request_id, before=before, after=after, reason=reason
        )
        return _cancel(client, queue, request)
    return "gone"


def _cancel(client: redis.Redis, queue: FleetQueue, request: InferenceRequest) -> str:
    was, record = execute_many(client, [queue.cancel(request.id), queue.record(request.id)])
    status: str = was.status
    if status == "gone" and record is not None and _is_owed(client, queue, request, record):
        status = "queued"
    if status == "queued" and record is not None:
        execute_many(client, end_cancelled(queue.keys, request, attempt=record.attempt, error_code=CODE))
    return status


def _is_owed(client: redis.Redis, queue: FleetQueue, request: InferenceRequest, record: RequestRecordView) -> bool:
    """Whether a call before this one took the request out of the queue, and broke off before its end."""
    if record.state != "cancelled" or record.finish is not None:
        return False
    return bool(execute(client, TenantLimits(queue.keys).holds(request.tenant, request.id)))
