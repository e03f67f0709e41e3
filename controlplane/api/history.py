"""History over minutes, hours and days, as series on an even grid."""

from datetime import datetime
from typing import Annotated, Literal

from django.http import HttpRequest
from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.api.access import ViewerAuth
from controlplane.api.queries import aware, without_nul
from dashboard.history_form import choose
from dashboard.selectors.alerts import list_marks
from dashboard.selectors.history import METRICS, PeriodError, metric_names, read_changes, read_series
from inference.gateway.errors import InvalidRequest

router = Router(tags=["operator"], auth=ViewerAuth())
MAX_METRICS = len(METRICS)


class Series(Schema):
    """A metric, a value per grain; null where nothing was recorded."""

    title: str
    unit: str
    values: list[float | None]
    compared: list[float | None] | None = Field(description="The same grains of the period it is compared with.")


class Change(Schema):
    """A switch of policy within the period."""

    when_s: float
    revision: int
    name: str
    previous_name: str
    by: str
    reason: str


class AlertMark(Schema):
    """An alert that fired in the period, or before it and still did; null where it still fires."""

    fired_s: float
    resolved_s: float | None
    rule: str
    severity: str
    subject: str
    reason: str


class History(Schema):
    """Times are unix seconds."""

    model: str
    start_s: float
    end_s: float
    resolution_s: int
    times_s: list[float]
    metrics: dict[str, Series]
    changes: list[Change]
    alerts: list[AlertMark]


class HistoryQuery(Schema, extra="forbid"):
    """Which period, of what, compared with which. `since` goes before `span`."""

    model: str = Field(max_length=128)
    span: Literal["", "15m", "1h", "6h", "24h", "7d", "30d"] = ""
    since: datetime | None = None
    until: datetime | None = None
    compare: Literal["", "previous", "day", "week"] = ""
    metric: list[str] = Field(default=[], max_length=MAX_METRICS, description=f"Of {', '.join(METRICS)}.")
    replica: str = Field(default="", max_length=128, description="Narrows what replicas recorded to one.")


@router.get("/operator/history", response=History, summary="Series over minutes, hours or days")
def read_history(request: HttpRequest, query: Annotated[HistoryQuery, Query()]) -> History:
    """For signed-in viewers. By seconds up to 15 minutes, by minutes up to 12 hours, else by hours; at most 92 days."""
    if unknown := [name for name in query.metric if name not in METRICS]:
        raise InvalidRequest(f"There is no metric {unknown[0][:60]!r}; there are {', '.join(METRICS)}.", param="metric")
    since, until = aware(query.since, "since"), aware(query.until, "until")
    try:
        chosen = choose(span=query.span, since=since, until=until, compare=query.compare, now=timezone.now())
    except PeriodError as error:
        raise InvalidRequest(str(error), param="until") from error
    model, names, period = without_nul(query.model), metric_names(query.metric), chosen.period
    replica = without_nul(query.replica)
    values = read_series(model, period, names, replica=replica)
    compared = read_series(model, chosen.compared, names, replica=replica) if chosen.compared else {}
    start_s = period.start.timestamp()
    return History(
        model=model,
        start_s=start_s,
        end_s=period.end.timestamp(),
        resolution_s=period.resolution,
        times_s=[start_s + i * period.resolution for i in range(period.num_grains)],
        metrics={
            name: Series(
                title=METRICS[name].title, unit=METRICS[name].unit, values=values[name], compared=compared.get(name)
            )
            for name in names
        },
        changes=[
            Change(
                when_s=row.created_at.timestamp(),
                revision=row.revision,
                name=row.name,
                previous_name=row.previous_name,
                by=row.actor_name,
                reason=row.reason,
            )
            for row in read_changes(model, period)
        ],
        alerts=[
            AlertMark(
                fired_s=row.fired_at.timestamp(),
                resolved_s=row.resolved_at.timestamp() if row.resolved_at else None,
                rule=row.rule_name,
                severity=row.severity,
                subject=row.subject,
                reason=row.reason,
            )
            for row in list_marks(model, period)
            if row.fired_at
        ],
    )
