"""How an alert moves from pending to firing to resolved: a pure function of where it stands, what is seen, and when."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from dashboard.alerts.kinds import Rule

GAP_S = 60.0
"""Where nothing was seen for longer, as when the ops worker was away, holding begins anew."""
Change = Literal["", "pending", "firing", "resolved", "dropped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """An open alert. `clear_at`: since when the figure of a firing one is good again."""

    firing: bool
    started_at: datetime
    seen_at: datetime
    clear_at: datetime | None = None


def advance(standing: Standing | None, breached: bool, rule: Rule, now: datetime) -> tuple[Standing | None, Change]:
    """The next standing and what changed; (None, "resolved") and (None, "dropped") are ends.

    What cannot be known now is not told here at all: nothing changes then.
    """
    if standing is None:
        if not breached:
            return None, ""
        new = Standing(firing=rule.hold_s == 0, started_at=now, seen_at=now)
        return new, "firing" if new.firing else "pending"
    if standing.firing:
        return _go_on_firing(standing, breached, rule, now)
    if not breached:
        return None, "dropped"
    began = standing.started_at if _seconds(standing.seen_at, now) <= GAP_S else now
    fires = _seconds(began, now) >= rule.hold_s
    return Standing(firing=fires, started_at=began, seen_at=now), "firing" if fires else ""


def _go_on_firing(standing: Standing, breached: bool, rule: Rule, now: datetime) -> tuple[Standing | None, Change]:
    if breached:
        return replace(standing, seen_at=now, clear_at=None), ""
    clear_at = standing.clear_at or now
    if _seconds(clear_at, now) >= rule.clear_s:
        return None, "resolved"
    return replace(standing, clear_at=clear_at), ""


def _seconds(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds()
