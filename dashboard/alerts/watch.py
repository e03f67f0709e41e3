"""Evaluates all rules: reads once, judges, and writes what changed together with its notices."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from redis.exceptions import RedisError

from dashboard.alerts.judging import Finding, judge_rule
from dashboard.alerts.kinds import Rule
from dashboard.alerts.lifecycle import Standing, advance
from dashboard.alerts.models import Alert, AlertRule, Notice
from dashboard.alerts.notices import write_notice
from dashboard.alerts.reader import read_all
from dashboard.alerts.readings import Readings
from scheduling.connection import live_keys, live_redis

log = logging.getLogger(__name__)

MAX_OPEN = 100
"""Alerts of a rule that are open at once; the worst ones go first."""
SUMMARY_S = 60
"""How long the sum for /metrics stands: where the ops worker is away, no count is shown rather than an old one."""
OPEN = (Alert.State.PENDING, Alert.State.FIRING)
Key = tuple[str, str]


def watch_alerts(
    read: Callable[[Iterable[Rule], datetime], Readings] = read_all, clock: Callable[[], datetime] = timezone.now
) -> int:
    """Evaluate every rule once; how many alerts began to fire or resolved.

    Raises DatabaseError, with nothing written. Two runs at once write one after the other: rules are locked, and an
    open alert of a rule and subject is unique.
    """
    now = clock()
    readings = read([rule.spec() for rule in AlertRule.objects.filter(enabled=True)], now)
    with transaction.atomic():
        rules = list(AlertRule.objects.select_for_update())
        enabled = [rule for rule in rules if rule.enabled]
        num = sum(_watch_rule(rule, _models_taken(rule, enabled), readings, now) for rule in enabled)
        num += _end_orphans([rule.pk for rule in enabled], now)
    _publish_summary(rules)
    return num


def _models_taken(rule: AlertRule, enabled: Sequence[AlertRule]) -> set[str]:
    """Models that have a rule of their own in place of this one, which is for all."""
    if rule.model:
        return set()
    return {other.model for other in enabled if (other.kind, other.severity) == (rule.kind, rule.severity)} - {""}


def _watch_rule(row: AlertRule, taken: set[str], readings: Readings, now: datetime) -> int:
    rule = row.spec()
    findings = judge_rule(rule, readings)
    if findings is None:
        return 0
    found = {finding.key: finding for finding in findings if finding.model not in taken}
    open_alerts = {(alert.model, alert.subject): alert for alert in Alert.objects.filter(rule=row, state__in=OPEN)}
    num = sum(_move(_Case(row, rule, alert, found.get(key)), now) for key, alert in open_alerts.items())
    for finding in _worst(found, open_alerts, rule):
        num += _move(_Case(row, rule, None, finding), now)
    return num


def _worst(found: Mapping[Key, Finding], open_alerts: Mapping[Key, Alert], rule: Rule) -> list[Finding]:
    """New breaches, as many as there is room for."""
    new = [finding for key, finding in found.items() if finding.breached and key not in open_alerts]
    new.sort(key=lambda finding: -abs(finding.value - rule.threshold))
    return new[: max(0, MAX_OPEN - len(open_alerts))]


@dataclass(frozen=True, slots=True)
class _Case:
    """A rule, its open alert about a subject if there is one, and what was found of it if anything is known."""

    row: AlertRule
    rule: Rule
    alert: Alert | None
    finding: Finding | None


def _move(case: _Case, now: datetime) -> int:
    """Bring one alert up to date; 1 where it began to fire or resolved."""
    alert, finding = case.alert, case.finding
    standing, change = advance(_standing(alert), finding is not None and finding.breached, case.rule, now)
    if change == "dropped" and alert is not None:
        alert.delete()
    elif change == "resolved" and alert is not None:
        end_alert(alert, _say_ending(case), now)
    elif standing is not None:
        alert = alert or _new_alert(case)
        _follow(alert, case, standing)
        if change == "firing":
            alert.fired_at = now
        alert.save()
        if change == "firing":
            log.warning("%s: %s", alert, alert.reason)
            write_notice(alert, Notice.Event.FIRING, now)
    return change in ("firing", "resolved")


def _standing(alert: Alert | None) -> Standing | None:
    if alert is None:
        return None
    return Standing(
        firing=alert.state == Alert.State.FIRING,
        started_at=alert.started_at,
        seen_at=alert.seen_at,
        clear_at=alert.clear_at,
    )


def _new_alert(case: _Case) -> Alert:
    assert case.finding is not None
    return Alert(rule=case.row, kind=case.row.kind, model=case.finding.model, subject=case.finding.subject)


def _follow(alert: Alert, case: _Case, standing: Standing) -> None:
    """Take over where the alert stands, and what is seen now where it is bad; a good figure leaves the reason."""
    alert.state = Alert.State.FIRING if standing.firing else Alert.State.PENDING
    alert.started_at, alert.seen_at, alert.clear_at = standing.started_at, standing.seen_at, standing.clear_at
    alert.rule_name, alert.severity, alert.threshold = case.row.name, case.row.severity, case.rule.threshold
    if case.finding is not None:
        alert.value = case.finding.value
        if case.finding.breached:
            alert.reason = case.finding.reason


def _say_ending(case: _Case) -> str:
    if case.finding is None:
        return "There is nothing to judge any more: no traffic, or the model, tenant or worker is gone."
    if case.finding.reason and not case.finding.breached:
        return case.finding.reason
    return f"Back to {case.finding.value:.4g} {case.row.unit}, within the threshold of {case.rule.threshold:g}."


def end_alert(alert: Alert, ending: str, now: datetime) -> None:
    """Resolve a firing alert, and tell of it. Call it in a transaction."""
    alert.state, alert.ending, alert.resolved_at = Alert.State.RESOLVED, ending, now
    alert.save()
    log.info("%s: resolved. %s", alert, ending)
    write_notice(alert, Notice.Event.RESOLVED, now)


def _end_orphans(enabled: Sequence[int], now: datetime) -> int:
    """Alerts whose rule was switched off or deleted."""
    orphans = Alert.objects.filter(~Q(rule__in=enabled) | Q(rule=None), state__in=OPEN)
    orphans.filter(state=Alert.State.PENDING).delete()
    firing = list(orphans.filter(state=Alert.State.FIRING))
    for alert in firing:
        end_alert(alert, "Its rule was deleted." if alert.rule_id is None else "Its rule was switched off.", now)
    return len(firing)


def _publish_summary(rules: Sequence[AlertRule]) -> None:
    """Leave in Redis what /metrics shows: a scrape reads no database."""
    firing: dict[str, int] = {}
    for name in Alert.objects.filter(state=Alert.State.FIRING).values_list("rule_name", flat=True):
        firing[name] = firing.get(name, 0) + 1
    summary = [[rule.name, rule.severity, firing.get(rule.name, 0)] for rule in rules]
    try:
        live_redis().set(live_keys().alerts, json.dumps(summary), ex=SUMMARY_S)
    except (RedisError, OSError) as error:
        log.warning("The count of alerts is not told to /metrics: %s", error)
