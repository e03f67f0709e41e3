"""Recorded requests: found by filters and the index that fits, read page by page from where the last one ended."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from django.db.models import Q, QuerySet

from inference.models import RequestRecord

MAX_ROWS = 200
MAX_COUNTED = 1000
"""Matches are counted up to here: counting all of a million takes longer than the page may."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last row that was read: its time, and its id among those of the same moment."""

    finished_at: datetime
    id: int

    def __str__(self) -> str:
        return f"{(self.finished_at - EPOCH) // timedelta(microseconds=1)}-{self.id}"

    @classmethod
    def parse(cls, text: str) -> "Cursor | None":
        """The cursor that `str` made; None for anything else."""
        microseconds, _, row_id = text.partition("-")
        if not (microseconds.isdecimal() and row_id.isdecimal() and len(microseconds) < 18 and len(row_id) < 19):
            return None
        return cls(EPOCH + timedelta(microseconds=int(microseconds)), int(row_id))


@dataclass(frozen=True, slots=True)
class RequestPage:
    """Rows, latest end first, and where to read on (None: there are no more)."""

    rows: list[RequestRecord]
    next: Cursor | None


def search_requests(wanted: RequestFilter, *, after: Cursor | None = None, limit: int = 50) -> RequestPage:
    """Requests that ended, latest first, from after `after` on."""
    limit = min(limit, MAX_ROWS)
    rows = _matching(wanted)
    if after is not None:
        # The first condition bounds the scan of the index, the second tells rows of the same microsecond apart.
        earlier = Q(finished_at__lt=after.finished_at) | Q(id__lt=after.id)
        rows = rows.filter(earlier, finished_at__lte=after.finished_at)
    found = list(rows.defer("timeline").order_by("-finished_at", "-id")[: limit + 1])
    last = found[limit - 1] if len(found) > limit else None
    return RequestPage(found[:limit], Cursor(last.finished_at, last.pk) if last else None)


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
