"""The audit trail: who changed what, from what to what, why, when and from where. It can only be read."""

from datetime import datetime
from typing import Annotated, Any

from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from controlplane.api.access import ViewerAuth
from controlplane.api.queries import aware, read_cursor, without_nul
from dashboard.selectors.audit import AuditFilter, list_actions
from dashboard.selectors.keyset import MAX_ROWS

router = Router(tags=["operator"], auth=ViewerAuth())


class ActionRow(Schema):
    """One change."""

    id: int
    when: datetime
    who: str
    address: str = Field(description="The browser's address; empty for commands and periodic tasks.")
    token: str = Field(description="The beginning of the operator's token that was used; empty for a session.")
    action: str
    target: str
    before: dict[str, Any]
    after: dict[str, Any]
    reason: str


class ActionsPage(Schema):
    """Latest first."""

    actions: list[ActionRow]
    next_after: str | None = Field(description="Give it as `after` to read on; null at the end.")


class AuditQuery(Schema, extra="forbid"):
    """Which actions; `action` and `target` are the beginnings of one."""

    who: str = Field(default="", max_length=150)
    action: str = Field(default="", max_length=63)
    target: str = Field(default="", max_length=200)
    since: datetime | None = None
    until: datetime | None = None
    after: str = Field(default="", max_length=40)
    limit: int = Field(default=50, ge=1, le=MAX_ROWS)


@router.get("/operator/audit", response=ActionsPage, summary="Who changed what")
def read_audit(request: HttpRequest, query: Annotated[AuditQuery, Query()]) -> ActionsPage:
    """For signed-in viewers."""
    after = read_cursor(query.after)
    wanted = AuditFilter(
        who=without_nul(query.who),
        action=without_nul(query.action),
        target=without_nul(query.target),
        since=aware(query.since, "since"),
        until=aware(query.until, "until"),
    )
    page = list_actions(wanted, after=after, limit=query.limit)
    rows = [
        ActionRow(
            id=row.pk,
            when=row.created_at,
            who=row.actor_name,
            address=row.address,
            token=row.token,
            action=row.action,
            target=row.target,
            before=row.before,
            after=row.after,
            reason=row.reason,
        )
        for row in page.rows
    ]
    return ActionsPage(actions=rows, next_after=str(page.next) if page.next else None)
