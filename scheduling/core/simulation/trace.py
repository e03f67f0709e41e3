"""Reads request traces: CSV with a header row, gzip too, sorted by arrival."""

import csv
import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from scheduling.core.request import Priority

REQUIRED = ("arrival_s", "tenant", "prompt_tokens", "output_tokens")
OPTIONAL = ("priority", "max_tokens")


class TraceError(Exception):
    """The trace cannot be used; the message names file, line and column."""


class TraceRequest(NamedTuple):
    """One request of a trace. Time runs from the trace's start; `output_tokens` is what it really generated."""

    arrival_s: float
    tenant: str
    prompt_tokens: int
    output_tokens: int
    priority: int = Priority.NORMAL
    max_tokens: int = 0
    """What the client asked for at most; where the trace does not say, what was generated."""
    deadline_s: float | None = None
    """By when it should be complete, on the clock of `arrival_s`."""
    share: float = 1.0
    """The tenant's weight under `fair`."""
    drop_expired: bool = False
    """Whether it is dropped when it still waits at its deadline."""

    def at_rate(self, rate: float) -> "TraceRequest":
        """The same where requests come so many times as fast; it has as long until its deadline as it had."""
        arrival_s = self.arrival_s / rate
        deadline_s = None if self.deadline_s is None else arrival_s + (self.deadline_s - self.arrival_s)
        return self._replace(arrival_s=arrival_s, deadline_s=deadline_s)


def read_trace(path: Path, *, rate: float = 1.0, limit: int | None = None) -> list[TraceRequest]:
    """The requests of a trace, in order; arrivals come `rate` times as fast, and at most `limit` are read.

    The columns `arrival_s`, `tenant`, `prompt_tokens`, `output_tokens` are needed; `priority` (a level's name or its
    number) and `max_tokens` are taken where they are; others are ignored. Raises TraceError.
    """
    if not 0 < rate < math.inf:
        raise TraceError(f"The rate must be a number above 0, not {rate!r}.")
    if limit is not None and limit < 1:
        raise TraceError(f"The limit must be at least 1, not {limit}.")
    requests: list[TraceRequest] = []
    try:
        with _open(path) as file:
            for request in _parse(path, file, rate):
                requests.append(request)
                if limit is not None and len(requests) >= limit:
                    break
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"The trace {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"The trace {path} is not CSV text: {error}.") from error
    if not requests:
        raise TraceError(f"The trace {path} holds no requests.")
    return requests


def _open(path: Path) -> TextIO:
    """The file's text, whether or not it is compressed: judged by its content, not its name."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", newline="") if is_gzip else path.open(newline="")


def _parse(path: Path, file: TextIO, rate: float) -> Iterator[TraceRequest]:
    rows = csv.reader(file)
    columns = _read_header(path, next(rows, []))
    arrival, tenant, prompt, output = (columns[name] for name in REQUIRED)
    priority, maximum = (columns.get(name) for name in OPTIONAL)
    latest = -math.inf
    for row in rows:
        if not row:
            continue
        line = _Line(path, rows.line_num, row)
        arrival_s = line.seconds(arrival, "arrival_s") / rate
        if arrival_s < latest:
            raise line.error(arrival, "arrival_s", "is earlier than the line before; a trace is sorted by arrival_s")
        latest = arrival_s
        output_tokens = line.count(output, "output_tokens")
        max_tokens = output_tokens if maximum is None else line.count(maximum, "max_tokens")
        if max_tokens < output_tokens:
            raise line.error(maximum or 0, "max_tokens", "is less than output_tokens")
        level = Priority.NORMAL if priority is None else line.priority(priority)
        yield TraceRequest(
            arrival_s, line.name(tenant), line.count(prompt, "prompt_tokens"), output_tokens, level, max_tokens
        )


def _read_header(path: Path, header: list[str]) -> dict[str, int]:
    columns = {name.strip().lstrip("\ufeff"): index for index, name in enumerate(header)}
    if missing := [name for name in REQUIRED if name not in columns]:
        raise TraceError(
            f"{path}, line 1: the header lacks the column {missing[0]}; it has: {', '.join(columns) or '-'}."
        )
    return columns


@dataclass(frozen=True, slots=True)
class _Line:
    """A row, and where it stands."""

    path: Path
    number: int
    row: list[str]

    def error(self, column: int, name: str, problem: str) -> TraceError:
        value = repr(self.row[column]) if column < len(self.row) else "nothing"
        return TraceError(f"{self.path}, line {self.number}, column {name}: {value} {problem}.")

    def text(self, column: int, name: str) -> str:
        if column >= len(self.row):
            raise self.error(column, name, "stands there; the line is too short")
        return self.row[column]

    def seconds(self, column: int, name: str) -> float:
        try:
            value = float(self.text(column, name))
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise self.error(column, name, "is not a number of seconds, 0 or more")
        return value

    def count(self, column: int, name: str) -> int:
        try:
            value = int(self.text(column, name))
        except ValueError:
            value = 0
        if value < 1:
            raise self.error(column, name, "is not a whole number, 1 or more")
        return value

    def name(self, column: int) -> str:
        value = self.text(column, "tenant").strip()
        if not value:
            raise self.error(column, "tenant", "is no name")
        return value

    def priority(self, column: int) -> Priority:
        value = self.text(column, "priority").strip()
        try:
            return Priority(int(value)) if value.isdigit() else Priority[value.upper()]
        except (KeyError, ValueError):
            levels = ", ".join(f"{level.name.lower()} ({level})" for level in Priority)
            raise self.error(column, "priority", f"is none of {levels}") from None
