"""The page of the audit trail: who changed what, from what to what, why, when and from where; and its export."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import Any

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.utils import timezone

from dashboard.export import csv_response
from dashboard.filters import Filters
from dashboard.page import render_page, viewers_only
from dashboard.selectors.audit import KNOWN_ACTIONS, AuditFilter, export_actions, list_actions
from dashboard.selectors.keyset import Cursor
from dashboard.selectors.revisions import changes
from scheduling.models import OperatorAction

ROWS = 50
FIELDS = ("who", "action", "target", "since", "until")


@viewers_only
def audit(request: HttpRequest) -> HttpResponse:
    """Latest first, by filters."""
    filters = Filters(request.GET)
    wanted = _read(filters)
    after = Cursor.parse(filters.text("after"))
    page = list_actions(wanted, after=after, limit=ROWS)
    context = {
        "rows": [{"action": row, "changes": _shown_changes(row)} for row in page.rows],
        "next": page.next,
        "newer": after is not None,
        "filters": wanted,
        "filtered": any(request.GET.get(name) for name in FIELDS),
        "problems": filters.problems,
        "known_actions": KNOWN_ACTIONS,
    }
    return render_page(request, "dashboard/audit.html", context, page="audit")


@viewers_only
def export(request: HttpRequest) -> StreamingHttpResponse:
    """What the filters find as CSV, times in UTC."""
    wanted = _read(Filters(request.GET))
    return csv_response(_lines(wanted), f"penstock-audit-{timezone.now():%Y%m%d-%H%M}.csv")


def _read(filters: Filters) -> AuditFilter:
    since, until = filters.window()
    return AuditFilter(
        who=filters.text("who", 150),
        action=filters.text("action", 63),
        target=filters.text("target", 200),
        since=since,
        until=until,
    )


def _lines(wanted: AuditFilter) -> Iterable[Iterable[Any]]:
    yield ["when", "who", "from", "token", "action", "target", "before", "after", "reason"]
    for row in export_actions(wanted):
        when = row.created_at.astimezone(UTC).isoformat()
        before, after = json.dumps(row.before), json.dumps(row.after)
        yield [when, row.actor_name, row.address, row.token, row.action, row.target, before, after, row.reason]


def _shown_changes(row: OperatorAction) -> list[tuple[str, Any, Any]]:
    """What differs; nested values (parameters, acknowledgements) under dotted names."""
    return changes(_flat(row.before), _flat(row.after))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and len(prefix) < 60:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
