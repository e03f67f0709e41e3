"""A what-if's result as a table: what really happened and what each policy would have done, side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduling.core.request import Priority

Figures = Mapping[str, Any]
MAX_TENANTS = 12


@dataclass(frozen=True, slots=True)
class Row:
    """A figure under each policy. `best` is the column of the best prediction, None where none stands out."""

    label: str
    kind: str
    values: list[float | None]
    best: int | None


@dataclass(frozen=True, slots=True)
class Table:
    """Columns are the record, the replay of the policy that was in force, then the candidates."""

    columns: list[str]
    groups: list[tuple[str, list[Row]]]


def compare(result: Figures) -> Table:
    """From what `inference.what_if.run_what_if` answered."""
    reports = [result["really"], result["replayed"], *result["candidates"]]
    columns = ["really happened", f"replayed: {result['replayed']['label']}"]
    columns += [one["label"] for one in result["candidates"]]
    tenants = sorted(result["really"]["tenants"], key=lambda name: -result["really"]["tenants"][name]["requests"])
    groups = [("All requests", _total(reports))]
    groups += [(f"Tenant {name}", _group(reports, "tenants", name)) for name in sorted(tenants[:MAX_TENANTS])]
    levels = [level.name.lower() for level in Priority]
    groups += [
        (f"Priority {level}", _group(reports, "priorities", level))
        for level in levels
        if level in result["really"]["priorities"]
    ]
    return Table(columns, groups)


def _total(reports: Sequence[Figures]) -> list[Row]:
    return [
        *_rows(reports, lambda report: report["total"]),
        _row("Output", "rate", [report["output_tokens_per_s"] for report in reports], higher=True),
        _row("Goodput", "rate", [report["goodput_tokens_per_s"] for report in reports], higher=True),
        _row("Jain's index", "index", [report["fairness"] for report in reports], higher=True),
    ]


def _group(reports: Sequence[Figures], part: str, name: str) -> list[Row]:
    return _rows(reports, lambda report: report[part].get(name))


def _rows(reports: Sequence[Figures], pick: Callable[[Figures], Figures | None]) -> list[Row]:
    groups = [pick(report) for report in reports]
    spreads = (("Wait, mean", "wait_s", "mean"), ("Wait, p99", "wait_s", "p99"), ("TTFT, p99", "ttft_s", "p99"))
    rows = [
        _row(title, "seconds", [None if group is None else group[name][figure] for group in groups], higher=False)
        for title, name, figure in (*spreads, ("End to end, p99", "e2e_s", "p99"))
    ]
    attained = [None if group is None else group["sla_attainment"] for group in groups]
    return [_row("Within the SLA", "share", attained, higher=True), *rows]


def _row(label: str, kind: str, values: list[float | None], *, higher: bool) -> Row:
    """Only simulations are compared with each other: all of them from the second column on."""
    known = [(value, column) for column, value in enumerate(values) if column and value is not None]
    best = None
    if known and max(known)[0] - min(known)[0] > 0.02 * abs(max(known)[0]):
        best = max(known)[1] if higher else min(known)[1]
    return Row(label, kind, values, best)
