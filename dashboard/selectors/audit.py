"""The audit trail, by filters, read page by page from where the last one ended."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from django.db.models import QuerySet

from dashboard.selectors.keyset import Cursor, Page, read_page
from scheduling.models import OperatorAction

MAX_EXPORTED = 100_000
KNOWN_ACTIONS = (
    "policy.switch", "what_if.ask", "request.cancel", "batch.cancel", "token.create", "token.revoke", "replica.pause",
    "replica.resume", "replica.drain", "replica.set_mode", "replica.set_batch_size", "replica.sizing", "replica.answer",
    "replica.add", "replica.remove", "replica.restart",
    "tenant.create", "tenant.update", "tenant.delete", "tenant.suspend", "tenant.resume", "quota.update",
    "servicelevel.create", "servicelevel.update", "servicelevel.delete",
    "key.create", "key.revoke", "deployment.create", "deployment.update",
    "user.create", "user.update", "user.delete", "user.password", "group.update",
    "alert.acknowledge", "alertrule.create", "alertrule.update", "alertrule.delete", "alertchannel.create",
    "alertchannel.update", "alertchannel.delete", "alertchannel.test", "delivery.retry",
)  # fmt: skip
"""What filters suggest; any other beginning may be given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilter:
    """Which actions; "" and None take all. `action` and `target` are the beginnings of one."""

    who: str = ""
    action: str = ""
    target: str = ""
    since: datetime | None = None
    until: datetime | None = None


def list_actions(wanted: AuditFilter, *, after: Cursor | None = None, limit: int = 50) -> Page[OperatorAction]:
    """Actions, latest first, from after `after` on."""
    return read_page(_matching(wanted), "created_at", after=after, limit=limit)


def export_actions(wanted: AuditFilter) -> Iterator[OperatorAction]:
    """All matches, latest first, at most MAX_EXPORTED."""
    yield from _matching(wanted)[:MAX_EXPORTED].iterator(chunk_size=1000)


def _matching(wanted: AuditFilter) -> QuerySet[OperatorAction]:
    rows: QuerySet[OperatorAction] = OperatorAction.objects.order_by("-created_at", "-id")
    if wanted.who:
        rows = rows.filter(actor_name=wanted.who)
    if wanted.action:
        rows = rows.filter(action__startswith=wanted.action)
    if wanted.target:
        rows = rows.filter(target__startswith=wanted.target)
    if wanted.since is not None:
        rows = rows.filter(created_at__gte=wanted.since)
    if wanted.until is not None:
        rows = rows.filter(created_at__lt=wanted.until)
    return rows
