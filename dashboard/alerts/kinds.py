"""What can be alerted on: each kind's figure, its unit, which side of a threshold is bad, and what to look at then."""

from collections.abc import Mapping
from dataclasses import dataclass

SEVERITIES = ("info", "warning", "critical")
"""From the least to the gravest."""
MAX_HOLD_S = 86_400
MAX_CLEAR_S = 86_400
HOUR_S, DAY_S = 3600, 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertKind:
    """A figure with its bounds. `falls`: lower is worse; windows are (least, most) seconds, None where it has none."""

    title: str
    unit: str
    description: str
    subject: str
    """What an alert is about: `model`, `tenant` (of a model) or `replica`."""
    page: str
    """URL name of the page that helps."""
    falls: bool = False
    threshold: float
    maximum: float
    window: tuple[int, int] | None = None
    short_window: tuple[int, int] | None = None


KINDS: Mapping[str, AlertKind] = {
    "occupancy": AlertKind(
        title="Batch occupancy while requests wait", unit="%", subject="model", page="fleet", falls=True,
        description="Used slots of the batches that ran in the window, while requests wait at this moment.",
        threshold=60, maximum=100, window=(15, 900),
    ),
    "queue": AlertKind(
        title="Waiting requests per ready worker", unit="requests", subject="model", page="dashboard",
        description="Requests in the queue, divided by the workers that take any.",
        threshold=100, maximum=1e6,
    ),
    "ready_workers": AlertKind(
        title="Ready workers of an offered model", unit="workers", subject="model", page="fleet", falls=True,
        description="Workers that take requests, also where none waits: an outage refuses them at admission.",
        threshold=1, maximum=1000,
    ),
    "refusals": AlertKind(
        title="Refused for want of capacity", unit="%", subject="model", page="tenants",
        description="Requests that admission refused (no worker, overload, a full queue), of those and what ended in "
        "the window.",
        threshold=5, maximum=100, window=(60, DAY_S),
    ),
    "step_time": AlertKind(
        title="Step time", unit="ms", subject="model", page="fleet",
        description="Mean time of an engine step in the window; the threshold is the target.",
        threshold=250, maximum=600_000, window=(15, 900),
    ),
    "completion": AlertKind(
        title="Completion", unit="%", subject="model", page="requests", falls=True,
        description="Requests answered, of those that ended in the window and were not cancelled by their clients.",
        threshold=95, maximum=100, window=(60, DAY_S),
    ),
    "sla_burn": AlertKind(
        title="SLA burn rate", unit="times", subject="tenant", page="tenants",
        description="How many times faster than the objective allows a tenant's error budget is spent, over the window "
        "and over the short one too, so that it ends soon after its cause.",
        threshold=14.4, maximum=1e4, window=(600, 30 * DAY_S), short_window=(60, 3 * DAY_S),
    ),
    "telemetry": AlertKind(
        title="Silence of telemetry", unit="s", subject="replica", page="fleet",
        description="How long a worker has told nothing of its device, or nothing at all.",
        threshold=30, maximum=3600,
    ),
    "throttling": AlertKind(
        title="Throttled", unit="% of time", subject="replica", page="fleet",
        description="Seconds of the window in which a device held its clocks down, its power cap aside.",
        threshold=20, maximum=100, window=(15, 900),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An alert rule as the evaluation sees it. `model` "" stands for all; windows are 0 where the kind has none."""

    kind: str
    threshold: float
    severity: str = "warning"
    model: str = ""
    window_s: int = 0
    short_window_s: int = 0
    hold_s: int = 0
    clear_s: int = 0

    def is_breached(self, value: float) -> bool:
        """Whether a value lies on the bad side of the threshold."""
        return value < self.threshold if KINDS[self.kind].falls else value > self.threshold


def find_problems(rule: Rule) -> dict[str, str]:
    """Field -> sentence, for what cannot be used."""
    kind = KINDS.get(rule.kind)
    if kind is None:
        return {"kind": f"The kind must be one of {', '.join(KINDS)}."}
    problems = {}
    if rule.severity not in SEVERITIES:
        problems["severity"] = f"The severity must be one of {', '.join(SEVERITIES)}."
    if not 0 <= rule.threshold <= kind.maximum:  # refuses what is no number too
        problems["threshold"] = f"The threshold must be a number from 0 to {kind.maximum:,.0f} {kind.unit}."
    for name, what, bounds in (
        ("hold_s", "The hold time", (0, MAX_HOLD_S)),
        ("clear_s", "The time until it resolves", (0, MAX_CLEAR_S)),
        ("window_s", "The window", kind.window),
        ("short_window_s", "The short window", kind.short_window),
    ):
        if sentence := _outside(getattr(rule, name), bounds, what):
            problems[name] = sentence
    if kind.short_window and "short_window_s" not in problems and rule.short_window_s >= rule.window_s:
        problems["short_window_s"] = "The short window must be shorter than the window."
    return problems


def _outside(value: int, bounds: tuple[int, int] | None, what: str) -> str:
    if bounds is None:
        return f"{what} is not used by this kind; it must be 0." if value else ""
    least, most = bounds
    return "" if least <= value <= most else f"{what} must be {least:,} to {most:,} seconds."
