"""Reports side by side, as text for a terminal."""

from collections.abc import Callable, Sequence

from scheduling.core.simulation.report import Group, Report

_Row = tuple[str, Callable[[Report], str]]


def format_seconds(value: float | None) -> str:
    """Seconds with three significant digits; milliseconds below one."""
    if value is None:
        return "-"
    return f"{1000 * value:.3g} ms" if 0 < value < 0.9995 else f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


ROWS: Sequence[_Row] = (
    ("requests finished", lambda r: f"{r.total.finished:,} of {r.total.requests:,}"),
    ("refused", lambda r: f"{r.total.refused:,}"),
    ("duration", lambda r: format_seconds(r.duration_s)),
    ("requests/s", lambda r: f"{r.requests_per_s:.2f}"),
    ("output tokens/s", lambda r: f"{r.output_tokens_per_s:,.0f}"),
    ("all tokens/s", lambda r: f"{r.tokens_per_s:,.0f}"),
    ("goodput, output tokens/s", lambda r: f"{r.goodput_tokens_per_s:,.0f}"),
    ("SLA attainment", lambda r: _share(r.total.sla_attainment)),
    ("TTFT mean", lambda r: format_seconds(r.total.ttft_s.mean)),
    ("TTFT p50", lambda r: format_seconds(r.total.ttft_s.p50)),
    ("TTFT p90", lambda r: format_seconds(r.total.ttft_s.p90)),
    ("TTFT p99", lambda r: format_seconds(r.total.ttft_s.p99)),
    ("end to end mean", lambda r: format_seconds(r.total.e2e_s.mean)),
    ("end to end p50", lambda r: format_seconds(r.total.e2e_s.p50)),
    ("end to end p90", lambda r: format_seconds(r.total.e2e_s.p90)),
    ("end to end p99", lambda r: format_seconds(r.total.e2e_s.p99)),
    ("largest wait", lambda r: format_seconds(r.total.wait_s.maximum)),
    ("Jain's index of service", lambda r: "-" if r.fairness is None else f"{r.fairness:.3f}"),
    ("preemptions", lambda r: f"{r.preemptions:,}"),
    ("batch size mean, largest", lambda r: f"{r.mean_batch_size:.1f}, {r.max_batch_size}"),
    ("policy switches", lambda r: f"{len(r.policy_changes)}"),
    ("busy", lambda r: _share(r.utilization)),
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def compare_reports(reports: Sequence[Report], *, max_groups: int = 12) -> str:
    """All reports in one table, then each tenant's and priority's figures.

    Of more than `max_groups` tenants those with the most requests are shown.
    """
    header = ["", *(report.label for report in reports)]
    parts = [format_table(header, [[name, *(read(report) for report in reports)] for name, read in ROWS])]
    reasons = sorted({reason for report in reports for reason in report.refusals})
    if reasons:
        rows = [[reason, *(f"{report.refusals.get(reason, 0):,}" for report in reports)] for reason in reasons]
        parts.append(format_table(["refused", *(report.label for report in reports)], rows))
    tenants = reports[0].tenants
    busiest = sorted(tenants, key=lambda name: -tenants[name].requests)[:max_groups]
    title = "tenant" if len(busiest) == len(tenants) else f"tenant ({len(busiest)} busiest of {len(tenants)})"
    parts.append(_compare_groups(f"by {title}", reports, busiest, lambda r: r.tenants))
    if len(reports[0].priorities) > 1:
        parts.append(_compare_groups("by priority", reports, list(reports[0].priorities), lambda r: r.priorities))
    return "\n\n".join(parts)


def _compare_groups(
    title: str, reports: Sequence[Report], names: Sequence[str], groups: Callable[[Report], dict[str, Group]]
) -> str:
    """A row for each group and report: what one policy did for a group stands under what another did."""
    spread = ("mean", "p50", "p90", "p99")
    header = [title, "", "SLA", *(f"TTFT {spread[0]}", *spread[1:]), *(f"end to end {spread[0]}", *spread[1:])]
    rows = []
    for name in names:
        for number, report in enumerate(reports):
            group = groups(report)[name]
            first = "" if number else f"{name} ({group.requests:,})"
            latencies = [getattr(part, figure) for part in (group.ttft_s, group.e2e_s) for figure in spread]
            rows.append([first, report.label, _share(group.sla_attainment), *map(format_seconds, latencies)])
    return format_table(header, rows)
