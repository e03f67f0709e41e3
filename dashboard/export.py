"""Downloads as CSV, written line by line."""

import csv
from collections.abc import Iterable
from typing import Any

from django.http import StreamingHttpResponse


def csv_response(lines: Iterable[Iterable[Any]], name: str) -> StreamingHttpResponse:
    """Lines of values as a file of this name."""
    writer = csv.writer(_Echo())
    response = StreamingHttpResponse((writer.writerow(map(safe_cell, line)) for line in lines), content_type="text/csv")
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


def safe_cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula is marked as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


class _Echo:
    """A file that gives back what is written to it."""

    def write(self, line: str) -> str:
        return line
