"""Offline work of all tenants: how far batches are, and their cancelling by an operator."""

from datetime import datetime
from typing import Annotated, Any, Literal

from django.contrib.auth.models import User
from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from controlplane.api.access import ControlAuth, ViewerAuth
from controlplane.api.queries import without_nul
from controlplane.api.request_log import CancelBody
from controlplane.offline.batches import cancel_for_operator
from controlplane.offline.selectors import MAX_LISTED, Work, find_work, list_work
from inference.gateway.errors import NotFound

router = Router(tags=["operator"], auth=ViewerAuth())
Status = Literal[
    "", "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]


class WorkView(Schema):
    """A batch of a tenant."""

    id: str
    tenant: str
    endpoint: str
    status: str
    total: int
    completed: int
    failed: int
    submitted: int = Field(description="Of what is left, in the queue or running.")
    errors: list[dict[str, Any]] = Field(description="Why its file could not be used, by line.")
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None


class WorkQuery(Schema, extra="forbid"):
    """Which batches."""

    tenant: str = Field(default="", max_length=63)
    status: Status = ""
    after: str = Field(default="", max_length=64, description="The `id` of the last one that was read.")
    limit: int = Field(default=50, ge=1, le=MAX_LISTED)


@router.get("/operator/batches", response=list[WorkView], summary="Offline work of all tenants")
def list_batches(request: HttpRequest, query: Annotated[WorkQuery, Query()]) -> list[WorkView]:
    """For signed-in viewers. What goes on first, then what ended, latest first."""
    works = list_work(
        tenant=without_nul(query.tenant), status=query.status, after=without_nul(query.after), limit=query.limit
    )
    return [_view(work) for work in works]


@router.get("/operator/batches/{batch_id}", response=WorkView, summary="How far a batch is")
def read_batch(request: HttpRequest, batch_id: str) -> WorkView:
    """For signed-in viewers."""
    return _view(_find(batch_id))


@router.post(
    "/operator/batches/{batch_id}/cancel", response=WorkView, auth=ControlAuth(), summary="Cancel a tenant's batch"
)
def cancel(request: HttpRequest, batch_id: str, body: CancelBody) -> WorkView:
    """For operators. What is done stays; the rest is given back as errors. Recorded with the reason."""
    user = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    cancel_for_operator(_find(batch_id).batch, actor=user, reason=body.reason)
    return _view(_find(batch_id))


def _find(batch_id: str) -> Work:
    work = find_work(batch_id)
    if work is None:
        raise NotFound(f"There is no batch {batch_id[:100]}.", code="batch_not_found")
    return work


def _view(work: Work) -> WorkView:
    batch = work.batch
    names = ("id", "tenant", "endpoint", "status", "errors", "created_at", "expires_at")
    counts = {name: getattr(work, name) for name in ("completed", "failed", "submitted", "ended_at")}
    return WorkView(total=batch.num_total, **{name: getattr(batch, name) for name in names}, **counts)
