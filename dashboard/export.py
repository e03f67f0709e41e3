"""Downloads as CSV, written line by line."""

import csv
from collections.abc import Iterable
from typing import Any

from django.http import StreamingHttpResponse

from scheduling.cells import safe_cell


def csv_response(lines: Iterable[Iterable[Any]], name: str) -> StreamingHttpResponse:
    """Lines of values as a file of this name."""
    writer = csv.writer(_Echo())
    response = StreamingHttpResponse((writer.writerow(map(safe_cell, line)) for line in lines), content_type="text/csv")
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


class _Echo:
    """A file that gives back what is written to it."""

    def write(self, line: str) -> str:
        return line
