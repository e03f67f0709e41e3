"""Recorded requests: found by filters and the index that fits, read page by page from where the last one ended."""

from dataclasses import dataclass
from datetime import datetime

from django.db.models import QuerySet

from dashboard.selectors.keyset import Cursor, Page, read_page
from inference.models import RequestRecord

MAX_COUNTED = 1000
"""Matches are counted up to here: counting all of a million takes longer than the page may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFilter:
    """Which requests; None and "" take all. `request_id` is the beginning of one. Times bound the end."""

    request_id: str = ""
    model: str = ""
    tenant: str = ""
    priority: int | None = None
    state: str = ""
    since: datetime | None = None
    until: datetime | None = None


def search_requests(wanted: RequestFilter, *, after: Cursor | None = None, limit: int = 50) -> Page[RequestRecord]:
    """Requests that ended, latest first, from after `after` on."""
    return read_page(_matching(wanted).defer("timeline"), "finished_at", after=after, limit=limit)


def count_requests(wanted: RequestFilter) -> int:
    """How many there are; MAX_COUNTED + 1 stands for more than MAX_COUNTED."""
    latest = _matching(wanted).order_by("-finished_at").values("id")[: MAX_COUNTED + 1]
    return latest.count()


def find_request(request_id: str) -> RequestRecord | None:
    """A recorded request by its whole id."""
    return RequestRecord.objects.filter(request_id=request_id).first()


def _matching(wanted: RequestFilter) -> QuerySet[RequestRecord]:
    exact = {"model": wanted.model, "tenant": wanted.tenant, "state": wanted.state, "priority": wanted.priority}
    rows = RequestRecord.objects.filter(**{name: value for name, value in exact.items() if value not in ("", None)})
    if wanted.request_id:
        rows = rows.filter(request_id__startswith=wanted.request_id)
    if wanted.since is not None:
        rows = rows.filter(finished_at__gte=wanted.since)
    if wanted.until is not None:
        rows = rows.filter(finished_at__lt=wanted.until)
    return rows
