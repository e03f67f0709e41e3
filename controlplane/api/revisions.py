"""The history of a queue's policies: who changed what, when and why, and how it went."""

from datetime import datetime
from typing import Annotated, Any

from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from controlplane.api.access import ViewerAuth
from controlplane.api.queries import without_nul
from dashboard.selectors.revisions import MAX_REVISIONS, list_revisions
from scheduling.models import PolicyRevision

router = Router(tags=["operator"], auth=ViewerAuth())


class RevisionRow(Schema):
    """A switch of policy, or a change of its parameters."""

    model: str
    revision: int
    name: str
    params: dict[str, Any]
    previous_name: str
    previous_params: dict[str, Any]
    by: str
    reason: str
    state: str = Field(description="applying, pending (the queue's store is away), applied or superseded")
    created_at: datetime
    applied_at: datetime | None
    num_moved: int | None = Field(description="Waiting requests that were ordered anew.")
    seconds: float | None
    acknowledgements: dict[str, Any]
    error: str


class RevisionsPage(Schema):
    """Newest first."""

    revisions: list[RevisionRow]
    next_before: int | None = Field(description="Give it as `before` to read on; null at the end.")


class RevisionsQuery(Schema, extra="forbid"):
    """Which revisions."""

    model: str = Field(max_length=128)
    before: int | None = Field(default=None, ge=1, le=2**31 - 1, description="Revisions below this one.")
    limit: int = Field(default=20, ge=1, le=MAX_REVISIONS)


@router.get("/operator/revisions", response=RevisionsPage, summary="What a queue's policy was, and why")
def list_policy_revisions(request: HttpRequest, query: Annotated[RevisionsQuery, Query()]) -> RevisionsPage:
    """For signed-in viewers."""
    rows, more = list_revisions(without_nul(query.model), before=query.before, limit=query.limit)
    return RevisionsPage(revisions=[_view(row) for row in rows], next_before=rows[-1].revision if more else None)


def _view(row: PolicyRevision) -> RevisionRow:
    names = [name for name in RevisionRow.model_fields if name != "by"]
    return RevisionRow(by=row.actor_name, **{name: getattr(row, name) for name in names})
