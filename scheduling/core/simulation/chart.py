"""Reports side by side, as one self-contained HTML page with charts drawn in SVG: no script, nothing fetched."""

import math
from collections.abc import Callable, Sequence
from html import escape

from scheduling.core.simulation.outcome import SimulationResult
from scheduling.core.simulation.report import Report
from scheduling.core.simulation.table import ROWS, format_seconds

COLOURS = ("#3b6fb6", "#c8553d", "#3d8f5f", "#8a5aa8", "#b98a1e", "#4a9aa8", "#a34a6b", "#6b7280")
WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 40
NUM_POINTS = 200
"""Points of a distribution's line."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d7dce3; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #343b47; --paper: #14181f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0 0 .4rem; } p { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1.6rem; }
svg { width: 100%; height: auto; } text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .name { fill: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin-top: 2rem; width: 100%; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
svg.key { width: 34px; height: 12px; vertical-align: middle; }
"""


def draw_page(title: str, subtitle: str, runs: Sequence[tuple[Report, SimulationResult]]) -> str:
    """An HTML page that compares simulations: distributions, bars and the table."""
    reports = [report for report, _ in runs]
    charts = [
        _figure("Time to first token: share of requests within it", _ttft_lines(runs)),
        _figure("Requests waiting over time", _queue_lines(runs)),
        _figure(
            "Goodput: output tokens a second within the SLA",
            _bars(reports, lambda r: r.goodput_tokens_per_s),
        ),
        _figure("Mean TTFT by tenant, lightest tenant first", _tenant_dots(reports)),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><p>{_legend(reports)}</p>
<div class="charts">{"".join(charts)}</div>{_table(reports)}</body></html>
"""


def _figure(title: str, body: str) -> str:
    label = escape(title, quote=True)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
    return f"<figure style='margin:0'><h2>{escape(title)}</h2>{svg}</figure>"


def _legend(reports: Sequence[Report]) -> str:
    return " &#160; ".join(f"{_key(i)} {escape(report.label)}" for i, report in enumerate(reports))


def _key(index: int) -> str:
    """The line and the dot by which a policy is told."""
    dashes = f' stroke-dasharray="{_dashes(index)}"' if _dashes(index) else ""
    return (
        f'<svg class="key" viewBox="0 0 34 12" aria-hidden="true"><line x1="1" x2="33" y1="6" y2="6" '
        f'stroke="{_colour(index)}" stroke-width="2"{dashes}/>'
        f'<circle cx="17" cy="6" r="4" fill="{_colour(index)}"/></svg>'
    )


def _table(reports: Sequence[Report]) -> str:
    head = "".join(f"<th>{escape(report.label)}</th>" for report in reports)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(read(report))}</td>' for report in reports)}</tr>"
        for name, read in ROWS
    )
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _dashes(index: int) -> str:
    """Lines are told apart without colour too."""
    return ("", "7 4", "2 3", "9 3 2 3")[index % 4]


class _Axis:
    """Maps values onto a stretch of pixels, by their size or by their logarithm."""

    def __init__(self, low: float, high: float, start: float, end: float, *, is_log: bool = False) -> None:
        self.is_log = is_log
        self._low, self._high = (math.log10(low), math.log10(high)) if is_log else (low, high)
        if self._high <= self._low:
            self._high = self._low + 1
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        scaled = math.log10(max(value, 1e-12)) if self.is_log else value
        share = min(1.0, max(0.0, (scaled - self._low) / (self._high - self._low)))
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self.is_log:
            return self._log_ticks()
        rough = (self._high - self._low) / 4
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
        first = math.ceil(self._low / step)
        return [i * step for i in range(first, int(self._high / step + 1e-9) + 1)]

    def _log_ticks(self) -> list[float]:
        """Powers of ten; where there are few, what lies between them; at least both ends."""
        for multiples in ((1,), (1, 2, 5)):
            powers = range(math.floor(self._low), math.floor(self._high + 1e-9) + 1)
            ticks = [multiple * 10.0**power for power in powers for multiple in multiples]
            ticks = [tick for tick in ticks if -1e-9 <= math.log10(tick) - self._low <= self._high - self._low + 1e-9]
            if len(ticks) > 2:
                return ticks
        return ticks if len(ticks) > 1 else [10.0**self._low, 10.0**self._high]


def _frame(x: _Axis | None, y: _Axis, format_x: Callable[[float], str], format_y: Callable[[float], str]) -> str:
    """Grid lines and the numbers at them."""
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(format_y(value))}</text>')
    for value in x.ticks() if x else ():
        at = x.at(value) if x else 0.0
        anchor = "end" if at > WIDTH - RIGHT - 16 else "middle"  # or the last number is cut off
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{escape(format_x(value))}</text>'
        )
    return "".join(parts)


def _line(points: Sequence[tuple[float, float]], index: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{_dashes(index)}"' if _dashes(index) else ""
    return f'<polyline points="{path}" fill="none" stroke="{_colour(index)}" stroke-width="2"{dashes}/>'


def _ttft_lines(runs: Sequence[tuple[Report, SimulationResult]]) -> str:
    series = [sorted(o.ttft_s for o in result.outcomes if o.ttft_s is not None) for _, result in runs]
    every = [values for values in series if values]
    if not every:
        return ""
    low = max(1e-3, min(values[0] for values in every))
    high = max(2 * low, *(values[-1] for values in every))
    x = _Axis(low, high, LEFT, WIDTH - RIGHT, is_log=True)
    y = _Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, format_seconds, lambda share: f"{share:.0%}")]
    for index, values in enumerate(series):
        points = [
            (x.at(values[min(len(values) - 1, i * len(values) // NUM_POINTS)]), y.at(i / NUM_POINTS))
            for i in range(NUM_POINTS + 1)
            if values
        ]
        parts.append(_line(points, index))
    return "".join(parts)


def _queue_lines(runs: Sequence[tuple[Report, SimulationResult]]) -> str:
    end_s = max(result.end_s for _, result in runs) or 1.0
    series = [_depths(result, end_s) for _, result in runs]
    x = _Axis(0.0, end_s, LEFT, WIDTH - RIGHT)
    y = _Axis(0.0, max(1, *(max(depths) for depths in series)), HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, lambda value: f"{value:,.0f} s", lambda value: f"{value:,.0f}")]
    for index, depths in enumerate(series):
        parts.append(_line([(x.at(i * end_s / NUM_POINTS), y.at(depth)) for i, depth in enumerate(depths)], index))
    return "".join(parts)


def _depths(result: SimulationResult, end_s: float) -> list[int]:
    """How many waited at each of the evenly spaced moments."""
    changes = [0] * (NUM_POINTS + 2)
    for outcome in result.outcomes:
        if outcome.claimed_s is not None:
            changes[math.ceil(outcome.request.arrival_s / end_s * NUM_POINTS)] += 1
            changes[math.ceil(outcome.claimed_s / end_s * NUM_POINTS)] -= 1
    depths, depth = [], 0
    for change in changes[: NUM_POINTS + 1]:
        depth += change
        depths.append(depth)
    return depths


def _bars(reports: Sequence[Report], read: Callable[[Report], float]) -> str:
    values = [read(report) for report in reports]
    y = _Axis(0.0, max(1e-9, *values), HEIGHT - BOTTOM, TOP + 14)
    parts = [_frame(None, y, str, lambda value: f"{value:,.4g}")]
    slot = (WIDTH - LEFT - RIGHT) / len(values)
    narrow = ' style="font-size: 10px"' if len(values) > 6 else ""
    for index, (report, value) in enumerate(zip(reports, values, strict=True)):
        left, top = LEFT + (index + 0.15) * slot, y.at(value)
        middle = LEFT + (index + 0.5) * slot
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.7 * slot:.1f}" height="{HEIGHT - BOTTOM - top:.1f}" '
            f'fill="{_colour(index)}" rx="3"/>'
            f'<text x="{middle:.1f}" y="{top - 5:.1f}" text-anchor="middle">{value:,.0f}</text>'
            f'<text class="name" x="{middle:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle"{narrow}>'
            f"{escape(report.label)}</text>"
        )
    return "".join(parts)


def _tenant_dots(reports: Sequence[Report]) -> str:
    """A dot for each tenant and policy; a row of like heights is an even treatment."""
    weights = {name: group.output_tokens for name, group in reports[0].tenants.items()}
    names = sorted(weights, key=lambda name: weights[name])
    means = [[report.tenants[name].ttft_s.mean for name in names] for report in reports]
    known = [value for row in means for value in row if value]
    if not known:
        return ""
    y = _Axis(min(known), max(known), HEIGHT - BOTTOM, TOP, is_log=True)
    slot = (WIDTH - LEFT - RIGHT) / len(names)
    parts = [_frame(None, y, str, format_seconds)]
    for index, row in enumerate(means):
        for place, value in enumerate(row):
            if value:
                # Side by side, or like treatment would hide all but one.
                at = LEFT + (place + 0.5) * slot + (index - (len(means) - 1) / 2) * min(9.0, 0.8 * slot / len(means))
                label = escape(f"{reports[index].label}, {names[place]}: {format_seconds(value)}")
                parts.append(
                    f'<circle cx="{at:.1f}" cy="{y.at(value):.1f}" r="4" fill="{_colour(index)}" fill-opacity=".8">'
                    f"<title>{label}</title></circle>"
                )
    if len(names) <= 8:
        for place, name in enumerate(names):
            at = LEFT + (place + 0.5) * slot
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(name)}</text>')
    return "".join(parts)
