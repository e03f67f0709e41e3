"""Long tables read page by page from where the last page ended, so that the thousandth costs what the first does."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

from django.db.models import Model, Q, QuerySet

MAX_ROWS = 200
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Row = TypeVar("Row", bound=Model)


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last row that was read: its time, and its id among those of the same moment."""

    at: datetime
    id: int

    def __str__(self) -> str:
        return f"{(self.at - EPOCH) // timedelta(microseconds=1)}-{self.id}"

    @classmethod
    def parse(cls, text: str) -> "Cursor | None":
        """The cursor that `str` made; None for anything else."""
        microseconds, _, row_id = text.partition("-")
        if not (microseconds.isdecimal() and row_id.isdecimal() and len(microseconds) < 18 and len(row_id) < 19):
            return None
        return cls(EPOCH + timedelta(microseconds=int(microseconds)), int(row_id))


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """Rows, latest first, and where to read on (None: there are no more)."""

    rows: list[Row]
    next: Cursor | None


def read_page(rows: QuerySet[Row], by: str, *, after: Cursor | None, limit: int) -> Page[Row]:
    """Rows by the time in the field `by`, latest first, from after `after` on; MAX_ROWS at most."""
    limit = min(limit, MAX_ROWS)
    if after is not None:
        # The first condition bounds the scan of the index, the second tells rows of the same microsecond apart.
        earlier = Q(**{f"{by}__lt": after.at}) | Q(id__lt=after.id)
        rows = rows.filter(earlier, **{f"{by}__lte": after.at})
    found = list(rows.order_by(f"-{by}", "-id")[: limit + 1])
    last = found[limit - 1] if len(found) > limit else None
    return Page(found[:limit], Cursor(getattr(last, by), last.pk) if last else None)
