"""A what-if's result as a table: what really happened and what each policy would have done, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scheduling.core.request import Priority

Figures = Mapping[str, Any]
MAX_TENANTS = 12
BOTH = "mean wait, share within the SLA"


Value = float | None


@dataclass(frozen=True, slots=True)
class Row:
    """A figure under each policy; `seconds` or `rate` or `index` or `share`, or a wait beside a share (`both`).

    `best` is the column of the best prediction, None where none stands out.
    """

    label: str
    kind: str
    values: list[Any]
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
    known = result["really"]["tenants"]
    busiest = sorted(known, key=lambda name: -known[name]["requests"])[:MAX_TENANTS]
    levels = [level.name.lower() for level in Priority if level.name.lower() in result["really"]["priorities"]]
    groups = [
        ("All requests", _total(reports)),
        (f"By tenant: {BOTH}", _parts(reports, "tenants", sorted(busiest))),
        (f"By priority: {BOTH}", _parts(reports, "priorities", levels)),
    ]
    return Table(columns, groups)


def _total(reports: Sequence[Figures]) -> list[Row]:
    totals = [report["total"] for report in reports]
    spreads = (("Wait, mean", "wait_s", "mean"), ("Wait, p99", "wait_s", "p99"), ("TTFT, mean", "ttft_s", "mean"))
    more = (("TTFT, p99", "ttft_s", "p99"), ("End to end, p99", "e2e_s", "p99"))
    return [
        _row("Within the SLA", "share", [total["sla_attainment"] for total in totals], higher=True),
        *(
            _row(title, "seconds", [total[name][at] for total in totals], higher=False)
            for title, name, at in spreads + more
        ),
        _row("Output", "rate", [report["output_tokens_per_s"] for report in reports], higher=True),
        _row("Goodput", "rate", [report["goodput_tokens_per_s"] for report in reports], higher=True),
        _row("Jain's index of service", "index", [report["fairness"] for report in reports], higher=True),
    ]


def _parts(reports: Sequence[Figures], part: str, names: Sequence[str]) -> list[Row]:
    return [_waited(name, [report[part].get(name) for report in reports]) for name in names]


def _waited(label: str, groups: Sequence[Figures | None]) -> Row:
    """Mean wait and attainment of some requests; the shortest wait is the best."""
    waits = [None if group is None else group["wait_s"]["mean"] for group in groups]
    shares = [None if group is None else group["sla_attainment"] for group in groups]
    best = _row(label, "seconds", waits, higher=False).best
    return Row(label, "both", list(zip(waits, shares, strict=True)), best)


def _row(label: str, kind: str, values: list[Value], *, higher: bool) -> Row:
    """Only simulations are compared with each other: all of them from the second column on."""
    known = [(value, column) for column, value in enumerate(values) if column and value is not None]
    best = None
    if known and max(known)[0] - min(known)[0] > 0.02 * abs(max(known)[0]):
        best = max(known)[1] if higher else min(known)[1]
    return Row(label, kind, values, best)
