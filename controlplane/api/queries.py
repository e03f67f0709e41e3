"""What queries of the operator's API share: texts, times and cursors as they come from outside."""

from datetime import UTC, datetime

from dashboard.selectors.keyset import Cursor
from inference.gateway.errors import InvalidRequest


def without_nul(value: str) -> str:
    """A text as PostgreSQL takes it."""
    return value.replace("\0", "")


def aware(when: datetime | None, param: str) -> datetime | None:
    """A time that says its zone, in UTC: PostgreSQL takes no zone further than 16 h. Raises InvalidRequest."""
    if when is not None and (when.tzinfo is None or not 1971 < when.year < 9998):
        raise InvalidRequest(f"`{param}` needs a time zone, such as 2026-03-01T12:00:00Z.", param=param)
    return when and when.astimezone(UTC)


def read_cursor(after: str) -> Cursor | None:
    """Where to read on; None for the beginning. Raises InvalidRequest."""
    cursor = Cursor.parse(after) if after else None
    if after and cursor is None:
        raise InvalidRequest("`after` is the `next_after` of a former answer.", param="after")
    return cursor
