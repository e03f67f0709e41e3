"""Filters that pages read from their address: what cannot be used is left out, and said at its field."""

from datetime import UTC, datetime, timedelta

from django.http import QueryDict
from django.utils import timezone
from django.utils.dateparse import parse_datetime


class Filters:
    """Reads fields of a query; `problems` collects a sentence for each that cannot be used."""

    def __init__(self, query: QueryDict) -> None:
        self._query = query
        self.problems: dict[str, str] = {}

    def text(self, name: str, max_length: int = 128) -> str:
        """A word without surrounding space, cut to its length, and without NUL, which PostgreSQL refuses."""
        return self._query.get(name, "").replace("\0", "").strip()[:max_length]

    def choice(self, name: str, choices: "list[str] | tuple[str, ...]") -> str:
        """One of `choices`, "" for none."""
        value = self.text(name)
        if value and value not in choices:
            self.problems[name] = f"Choose one of {', '.join(choices)}."
            return ""
        return value

    def moment(self, name: str) -> datetime | None:
        """A time in the reader's zone; None for none."""
        value = self.text(name, 40)
        if not value:
            return None
        try:
            parsed = parse_datetime(value)
        except ValueError:  # well formed, but no such day
            parsed = None
        if parsed is None or not 1971 < parsed.year < 9998:
            self.problems[name] = "Give a day and a time, such as 2026-03-01T12:00."
            return None
        # In UTC: PostgreSQL takes no zone further than 16 h.
        return parsed.astimezone(UTC) if timezone.is_aware(parsed) else timezone.make_aware(parsed)

    def window(self) -> tuple[datetime | None, datetime | None]:
        """`since` and `until`, in their order."""
        since, until = self.moment("since"), self.moment("until")
        if since and until and until <= since:
            self.problems["until"] = "The end must be after the beginning."
            return since, since + timedelta(hours=1)
        return since, until
