"""Batches of a tenant: made, read line by line, cancelled, and ended with their output files."""

import json
import re
import time
import uuid
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from controlplane.models import Batch, BatchLine
from controlplane.offline.files import ACTIVE, content_path, find_file, store_parts
from inference.gateway.errors import InvalidRequest, NotFound
from scheduling.audit import record_action

WINDOW = timedelta(hours=24)
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
MAX_LINES = 50_000
MAX_ACTIVE = 20
"""Batches of one tenant that have not ended."""
MAX_ERRORS = 20
LINES_IN_MEMORY = 100
"""Of an ending batch: with its answers it may be larger than the memory that there is."""
FIELDS = {"custom_id", "method", "url", "body"}
UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that JSON can name and a database cannot hold: NUL, and halves of surrogate pairs."""


def create_batch(*, tenant: str, input_file_id: str, endpoint: str, window: str, metadata: dict[str, str]) -> Batch:
    """A batch to be read by the runner. Raises InvalidRequest or NotFound."""
    if endpoint not in ENDPOINTS:
        raise InvalidRequest(f"endpoint must be one of {', '.join(ENDPOINTS)}.", param="endpoint")
    if window != "24h":
        raise InvalidRequest("completion_window must be 24h.", param="completion_window")
    if find_file(tenant, input_file_id).purpose != "batch":
        raise InvalidRequest("The file's purpose is not batch.", param="input_file_id")
    if Batch.objects.filter(tenant=tenant, status__in=ACTIVE).count() >= MAX_ACTIVE:
        raise InvalidRequest(f"{MAX_ACTIVE} batches of this tenant have not ended.", code="too_many_batches")
    return Batch.objects.create(
        id=f"batch_{uuid.uuid4().hex}",
        tenant=tenant,
        endpoint=endpoint,
        input_file_id=input_file_id,
        metadata=metadata,
        expires_at=timezone.now() + WINDOW,
    )


def find_batch(tenant: str, batch_id: str) -> Batch:
    """Raises NotFound, for another tenant's batch too."""
    batch = None if "\0" in batch_id else Batch.objects.filter(tenant=tenant, id=batch_id).first()
    if batch is None:
        raise NotFound(f"There is no batch {batch_id[:100]}.", code="batch_not_found")
    return batch


def cancel_batch(batch: Batch) -> Batch:
    """What runs is stopped by the runner; what is done stays. Raises InvalidRequest where it has ended."""
    mine = Batch.objects.filter(pk=batch.pk, status__in=(Batch.Status.VALIDATING, Batch.Status.IN_PROGRESS))
    if not mine.exists() and batch.status != Batch.Status.CANCELLING:
        raise InvalidRequest(f"The batch is {batch.status} and cannot be cancelled.", code="batch_ended")
    for one in mine:
        reach(one, Batch.Status.CANCELLING)
    batch.refresh_from_db()
    return batch


@transaction.atomic
def cancel_for_operator(batch: Batch, *, actor: User, reason: str) -> Batch:
    """`cancel_batch`, written into the audit trail. Raises InvalidRequest."""
    before = batch.status
    cancelled = cancel_batch(batch)
    after = {"status": cancelled.status, "tenant": batch.tenant}
    record_action(
        actor=actor, action="batch.cancel", target=batch.id, before={"status": before}, after=after, reason=reason
    )
    return cancelled


def reach(batch: Batch, status: Batch.Status, **changes: Any) -> bool:
    """Move a batch on, unless somebody else did since it was read; whether it was moved."""
    moments = {**batch.moments, status.value: int(time.time())}
    known = Batch.objects.filter(pk=batch.pk, status=batch.status)
    moved = bool(known.update(status=status, moments=moments, **changes))
    if moved:
        batch.refresh_from_db()
    return moved


def read_lines(batch: Batch) -> None:
    """Take the input file apart: the batch is `in_progress`, or `failed` with its first errors by line."""
    try:
        content = content_path(batch.input_file_id).read_bytes()
    except OSError:
        content = b""
    lines, errors = _parse(batch, content)
    if not lines and not errors:
        errors = [_error(0, "empty_file", "The file has no requests.")]
    if errors:
        reach(batch, Batch.Status.FAILED, errors=errors[:MAX_ERRORS])
        return
    with transaction.atomic():
        batch.lines.all().delete()
        BatchLine.objects.bulk_create(lines, batch_size=500)
        reach(batch, Batch.Status.IN_PROGRESS, num_total=len(lines))


def _parse(batch: Batch, content: bytes) -> tuple[list[BatchLine], list[dict[str, Any]]]:
    lines: list[BatchLine] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, raw in enumerate(content.splitlines(), 1):
        if not raw.strip():
            continue
        if len(lines) >= MAX_LINES:
            errors.append(_error(number, "too_many_requests", f"A batch has at most {MAX_LINES} requests."))
            break
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError):  # the latter: nested too deep
            fields = None
        problem = _problem(fields, batch.endpoint, seen)
        if problem:
            errors.append(_error(number, "invalid_request", problem))
        else:
            seen.add(fields["custom_id"])
            body = json.dumps(fields["body"])
            lines.append(BatchLine(batch=batch, number=number, custom_id=fields["custom_id"], body=body))
    return lines, errors


def _problem(fields: Any, endpoint: str, seen: set[str]) -> str:
    if not isinstance(fields, dict) or set(fields) != FIELDS:
        return f"A line is a JSON object of {', '.join(sorted(FIELDS))}."
    custom_id = fields["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 256 or UNSTORABLE.search(custom_id):
        return "custom_id is a text of 1 to 256 characters."
    if custom_id in seen:
        return f"custom_id {custom_id[:50]} occurs twice."
    if fields["method"] != "POST" or fields["url"] != endpoint:
        return f"method is POST and url is the batch's endpoint, {endpoint}."
    return "" if isinstance(fields["body"], dict) else "body is an object."


def _error(line: int, code: str, message: str) -> dict[str, Any]:
    return {"line": line, "code": code, "message": message, "param": None}


def end_batch(batch: Batch, status: Batch.Status) -> None:
    """Write what the lines became into files, and forget the lines. Lines without an end get an error of their own."""
    code = f"batch_{status.value}"
    lost = json.dumps({"error": {"code": code, "message": "The batch ended before this request."}})
    unfinished = batch.lines.filter(state__in=(BatchLine.State.PENDING, BatchLine.State.SUBMITTED))
    unfinished.update(state=BatchLine.State.FAILED, answer=lost, status_code=0)
    changes: dict[str, Any] = {}
    with transaction.atomic():
        for state, field, name in (
            (BatchLine.State.COMPLETED, "output_file_id", "output"),
            (BatchLine.State.FAILED, "error_file_id", "errors"),
        ):
            lines = batch.lines.filter(state=state)
            num = changes["num_completed" if field == "output_file_id" else "num_failed"] = lines.count()
            if num:
                rows = (_output(line) for line in lines.iterator(chunk_size=LINES_IN_MEMORY))
                file = store_parts(
                    tenant=batch.tenant, filename=f"{batch.id}_{name}.jsonl", purpose="batch_output",
                    parts=(json.dumps(row).encode() + b"\n" for row in rows),
                )  # fmt: skip
                changes[field] = file.id
        batch.lines.all().delete()
        if not reach(batch, status, **changes):  # cancelled meanwhile: the lines are still needed
            transaction.set_rollback(True)


def _output(line: BatchLine) -> dict[str, Any]:
    answer = json.loads(line.answer)
    whole = {"status_code": line.status_code, "request_id": line.request_id, "body": answer}
    return {
        "id": f"batch_req_{line.request_id}",
        "custom_id": line.custom_id,
        "response": whole if line.status_code else None,
        "error": None if line.status_code else answer["error"],
    }
