"""Tenants as files, CSV or JSON: written with quotas and latency targets and without keys, and read line by line."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduling.cells import plain_cell, safe_cell
from scheduling.models import PriorityLevel, Quota, ServiceLevel, Tenant

MAX_BYTES = 1_000_000
MAX_TENANTS = 5_000
TEXTS = ("name", "display_name")
FLAGS = ("suspended", "drop_expired")
LIMITS = ("rpm", "tpm", "tpd", "concurrency")
FIELDS = (*TEXTS, "weight", *FLAGS, *LIMITS, "max_priority", "service_levels")
LEVEL_FIELDS = ("priority", "ttft_ms", "tpot_ms", "e2e_ms", "objective_percent")
PRIORITIES = {level.label: level.value for level in PriorityLevel}
Values = dict[str, Any]


class FileError(ValueError):
    """The file cannot be read at all; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong at a line of a CSV file, or a place of a JSON list, counted from 1; `field` "" for all of it."""

    line: int
    field: str
    message: str


@dataclass(slots=True, kw_only=True)
class Entry:
    """A tenant of a file: the fields that it names, in Python's types."""

    line: int
    values: Values
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, name: str, message: str) -> None:
        """Note what is wrong."""
        self.problems.append(Problem(line=self.line, field=name, message=message))


def read_current() -> dict[str, Values]:
    """Every tenant with its values, as a file has them."""
    levels: dict[int, list[ServiceLevel]] = {}
    for level in ServiceLevel.objects.filter(tenant__isnull=False).order_by("priority"):
        levels.setdefault(level.tenant_id or 0, []).append(level)
    rows = Tenant.objects.select_related("quota").order_by("name")
    return {tenant.name: _values(tenant, levels.get(tenant.pk, [])) for tenant in rows}


def write_json(tenants: Mapping[str, Values]) -> str:
    """All tenants as one object."""
    return json.dumps({"tenants": list(tenants.values())}, indent=2) + "\n"


def write_csv(tenants: Mapping[str, Values]) -> str:
    """A line for each; its latency targets as JSON in one cell."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(FIELDS)
    for values in tenants.values():
        cells = values | {"service_levels": json.dumps(values["service_levels"]) if values["service_levels"] else ""}
        writer.writerow([safe_cell(_cell(cells[name])) for name in FIELDS])
    return out.getvalue()


def read_file(content: bytes) -> list[Entry]:
    """The tenants of a file, each with what is wrong with it. Raises FileError."""
    if len(content) > MAX_BYTES:
        raise FileError(f"The file has more than {MAX_BYTES:,} bytes.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError("The file is not in UTF-8.") from error
    if "\0" in text:
        raise FileError("The file has NUL characters: it is no text.")
    rows = _json_rows(text) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text)
    if not rows:
        raise FileError("The file names no tenant.")
    if len(rows) > MAX_TENANTS:
        raise FileError(f"The file has more than {MAX_TENANTS:,} tenants.")
    entries = [_entry(line, row) for line, row in rows]
    seen: dict[str, int] = {}
    for entry in entries:
        name = str(entry.values.get("name", ""))
        if name in seen:
            entry.refuse("name", f"{name[:63]} stands in line {seen[name]} already.")
        seen.setdefault(name, entry.line)
    return entries


def _values(tenant: Tenant, levels: Sequence[ServiceLevel]) -> Values:
    quota = getattr(tenant, "quota", None) or Quota(tenant=tenant)
    return {
        **{name: getattr(tenant, name) for name in (*TEXTS, "weight", *FLAGS)},
        **{name: getattr(quota, name) for name in LIMITS},
        "max_priority": PriorityLevel(quota.max_priority).label,
        "service_levels": [
            {name: getattr(level, name) for name in LEVEL_FIELDS} | {"priority": PriorityLevel(level.priority).label}
            for level in levels
        ],
    }


def _cell(value: Any) -> Any:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


def _json_rows(text: str) -> list[tuple[int, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"The file is no JSON: {error}.") from error
    rows = found.get("tenants") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise FileError('A list of tenants is needed, as {"tenants": [...]}.')
    return list(enumerate(rows, 1))


def _csv_rows(text: str) -> list[tuple[int, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        unknown = [name for name in reader.fieldnames or [] if name not in FIELDS]
        if "name" not in (reader.fieldnames or []) or unknown:
            raise FileError(f"The first line names the columns: name, and any of {', '.join(FIELDS[1:])}.")
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise FileError(f"The file is no CSV: {error}.") from error


def _entry(line: int, row: Any) -> Entry:
    entry = Entry(line=line, values={})
    if not isinstance(row, dict) or None in row:
        entry.refuse("", "A tenant has the fields that the first line names, and no more.")
        return entry
    for name in [name for name in row if name not in FIELDS]:
        entry.refuse(str(name)[:63], f"There is no such field; there are {', '.join(FIELDS)}.")
    for name in FIELDS:
        if name in row:
            _take(entry, name, plain_cell(row[name]) if isinstance(row[name], str) else row[name])
    if not entry.values.get("name"):
        entry.refuse("name", "A tenant needs its name.")
    return entry


def _take(entry: Entry, name: str, value: Any) -> None:
    """Note a field's value in its type, or what is wrong with it."""
    try:
        if name in TEXTS:
            entry.values[name] = _text(value)
        elif name in FLAGS:
            entry.values[name] = _flag(value)
        elif name == "weight":
            entry.values[name] = 1.0 if value in ("", None) else float(_number(value))
        elif name in LIMITS:
            entry.values[name] = _whole(value)
        elif name == "max_priority":
            entry.values[name] = _priority(value or PriorityLevel.HIGH.label)
        else:
            entry.values[name] = _levels(value)
    except (ValueError, OverflowError) as error:
        entry.refuse(name, str(error))


def _text(value: Any) -> str:
    if not isinstance(value, str | None):
        raise ValueError("A text is needed.")
    return (value or "").strip()


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"": False, "false": False, "no": False, "0": False, "true": True, "yes": True, "1": True}
    if not isinstance(value, str | None) or (value or "").strip().lower() not in known:
        raise ValueError("true or false is needed.")
    return known[(value or "").strip().lower()]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("A number is needed.")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{str(value)[:40]} is no number.")
    return number


def _whole(value: Any) -> int | None:
    """Empty: no limit."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    number = _number(value)
    if number != int(number):
        raise ValueError(f"{str(value)[:40]} is no whole number.")
    return int(number)


def _priority(value: Any) -> str:
    if not isinstance(value, str) or value.strip() not in PRIORITIES:
        raise ValueError(f"A priority is one of {', '.join(PRIORITIES)}.")
    return value.strip()


def _levels(value: Any) -> list[Values]:
    """Latency targets, one for each priority at most."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise ValueError("A list of targets as JSON is needed.") from None
    if not isinstance(value, list | None) or not all(isinstance(row, dict) for row in value or []):
        raise ValueError('A list is needed, such as [{"priority": "high", "ttft_ms": 500}].')
    levels = [_level(row) for row in value or []]
    if len({level["priority"] for level in levels}) < len(levels):
        raise ValueError("A priority has two lines of targets.")
    return sorted(levels, key=lambda level: PRIORITIES[level["priority"]])


def _level(row: Values) -> Values:
    if unknown := [name for name in row if name not in LEVEL_FIELDS]:
        raise ValueError(f"A target has no field {str(unknown[0])[:40]}; there are {', '.join(LEVEL_FIELDS)}.")
    targets = {name: _whole(row.get(name)) for name in LEVEL_FIELDS[1:4]}
    given = [target for target in targets.values() if target is not None]
    if not given or min(given) < 1:
        raise ValueError("Give at least one target, in milliseconds, of 1 or more.")
    objective = 99.0 if row.get("objective_percent") in (None, "") else _number(row["objective_percent"])
    return {"priority": _priority(row.get("priority")), **targets, "objective_percent": objective}
