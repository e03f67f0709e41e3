"""Alerts for reading: what is open, what was, how many fire, and how its notices fare."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Case, Count, IntegerField, Max, Q, QuerySet, Value, When

from dashboard.alerts.kinds import SEVERITIES
from dashboard.alerts.models import Alert, AlertChannel, AlertRule, Delivery
from dashboard.selectors.history import Period
from dashboard.selectors.keyset import Cursor, Page, read_page
from dashboard.state import Document

MAX_SHOWN = 300
"""Open alerts on one page."""
MAX_MARKS = 200
RANK = Case(
    *(When(severity=name, then=Value(rank)) for rank, name in enumerate(SEVERITIES)), output_field=IntegerField()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertFilter:
    """Which alerts; "" and None take all. Times bound when it began."""

    state: str = ""
    severity: str = ""
    model: str = ""
    subject: str = ""
    rule: str = ""
    since: datetime | None = None
    until: datetime | None = None


def list_alerts(wanted: AlertFilter, *, after: Cursor | None = None, limit: int = 50) -> Page[Alert]:
    """Alerts, latest first, from after `after` on."""
    return read_page(_matching(wanted), "started_at", after=after, limit=limit)


def _matching(wanted: AlertFilter) -> QuerySet[Alert]:
    exact = {
        "state": wanted.state,
        "severity": wanted.severity,
        "model": wanted.model,
        "subject": wanted.subject,
        "rule_name": wanted.rule,
        "started_at__gte": wanted.since,
        "started_at__lt": wanted.until,
    }
    kept = {name: value for name, value in exact.items() if value not in ("", None)}
    return Alert.objects.filter(**kept).order_by("-started_at", "-id")


def open_alerts() -> list[Alert]:
    """What fires, the gravest first and the longest first among those, and then what is pending."""
    rows = Alert.objects.exclude(state=Alert.State.RESOLVED).annotate(
        rank=RANK, pending=Case(When(state=Alert.State.PENDING, then=1), default=0, output_field=IntegerField())
    )
    return list(rows.order_by("pending", "-rank", "started_at", "id")[:MAX_SHOWN])


def count_firing() -> Document:
    """How many fire, how many of those nobody has acknowledged, and the newest: what every page tells."""
    found = Alert.objects.filter(state=Alert.State.FIRING).aggregate(
        firing=Count("id"), unacknowledged=Count("id", filter=Q(acknowledged_at=None)), newest=Max("id")
    )
    return {"firing": found["firing"], "unacknowledged": found["unacknowledged"], "newest": found["newest"] or 0}


def list_rules() -> list[AlertRule]:
    """All rules with how many of their alerts fire (`num_firing`)."""
    firing = Count("alerts", filter=Q(alerts__state=Alert.State.FIRING))
    return list(AlertRule.objects.annotate(num_firing=firing).order_by("name"))


def list_channels() -> list[AlertChannel]:
    """All channels with `waiting`, `given_up`, `last_delivered_at`, and why the last try failed (`last_error`)."""
    state = Delivery.State
    channels: list[Any] = list(
        AlertChannel.objects.annotate(
            waiting=Count("deliveries", filter=Q(deliveries__state=state.WAITING)),
            given_up=Count("deliveries", filter=Q(deliveries__state=state.GIVEN_UP)),
            last_delivered_at=Max("deliveries__delivered_at"),
        ).order_by("name")
    )
    for channel in channels:
        failed = channel.deliveries.exclude(state=state.DELIVERED).exclude(error="").order_by("-id").first()
        channel.last_error = failed.error if failed else ""
    return channels


def list_marks(model: str, period: Period) -> list[Alert]:
    """Alerts of a model that fired within a period, or before it and still did, oldest first."""
    rows = Alert.objects.filter(model=model, fired_at__lt=period.end)
    rows = rows.filter(Q(resolved_at=None) | Q(resolved_at__gte=period.start))
    return list(rows.order_by("fired_at", "id")[:MAX_MARKS])
