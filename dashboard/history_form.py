"""Which period a page or an export shows: a span up to now, or between two times; and what it is compared with."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from dashboard.selectors.history import Period, PeriodError, choose_period

SPANS = {
    "15m": ("15 minutes", timedelta(minutes=15)),
    "1h": ("1 hour", timedelta(hours=1)),
    "6h": ("6 hours", timedelta(hours=6)),
    "24h": ("24 hours", timedelta(days=1)),
    "7d": ("7 days", timedelta(days=7)),
    "30d": ("30 days", timedelta(days=30)),
}
DEFAULT_SPAN = "1h"
COMPARISONS = {
    "": ("nothing", None),
    "previous": ("the period before", timedelta(0)),
    "day": ("a day before", timedelta(days=1)),
    "week": ("a week before", timedelta(days=7)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A period, and the one it is compared with."""

    period: Period
    compared: Period | None


def choose(*, span: str, since: datetime | None, until: datetime | None, compare: str, now: datetime) -> Chosen:
    """From fields of a form or a query; `since` goes before `span`. Raises PeriodError."""
    end = until or now
    length = SPANS.get(span, SPANS[DEFAULT_SPAN])[1]
    period = choose_period(since or end - length, end)
    if compare not in COMPARISONS:
        raise PeriodError(f"A period is compared with one of {', '.join(filter(None, COMPARISONS))}.")
    offset = COMPARISONS[compare][1]
    if offset is None:
        return Chosen(period=period, compared=None)
    return Chosen(period=period, compared=period.shifted((offset or period.end - period.start).total_seconds()))
