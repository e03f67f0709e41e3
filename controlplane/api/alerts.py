"""Alerts and their rules: what fires and what did, acknowledging, changing a rule, and how notices fare."""

from datetime import datetime
from typing import Annotated, Any, Literal

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from controlplane.api.access import OperatorAuth, ViewerAuth
from controlplane.api.queries import aware, read_cursor, without_nul
from controlplane.api.schemas import STORABLE
from dashboard.alerts.kinds import KINDS, MAX_CLEAR_S, MAX_HOLD_S
from dashboard.alerts.models import Alert, AlertRule
from dashboard.alerts.services import AlertError, acknowledge, change_rule
from dashboard.selectors.alerts import AlertFilter, list_alerts, list_channels, list_rules
from dashboard.selectors.keyset import MAX_ROWS
from inference.gateway.errors import InvalidRequest, NotFound

router = Router(tags=["alerts"], auth=ViewerAuth())
SeverityName = Literal["info", "warning", "critical"]
MAX_WINDOW_S = 30 * 86_400


class AlertView(Schema):
    """One firing of a rule."""

    id: int
    rule: str
    kind: str
    severity: SeverityName
    model: str
    subject: str = Field(description="A tenant or a replica of the model; empty: the model itself.")
    state: Literal["pending", "firing", "resolved"]
    value: float
    threshold: float
    unit: str
    reason: str = Field(description="What is wrong, and what to do next.")
    ending: str = Field(description="Why it resolved.")
    started_at: datetime = Field(description="Since when the figure is bad.")
    fired_at: datetime | None
    resolved_at: datetime | None
    acknowledged_at: datetime | None
    acknowledged_by: str
    note: str


class AlertsPage(Schema):
    """Latest first."""

    alerts: list[AlertView]
    next_after: str | None = Field(description="Give it as `after` to read on; null at the end.")


class AlertsQuery(Schema, extra="forbid"):
    """Which alerts. Times bound when they began."""

    state: Literal["", "pending", "firing", "resolved"] = ""
    severity: Literal["", "info", "warning", "critical"] = ""
    model: str = Field(default="", max_length=128)
    subject: str = Field(default="", max_length=128)
    rule: str = Field(default="", max_length=80)
    since: datetime | None = None
    until: datetime | None = None
    after: str = Field(default="", max_length=40)
    limit: int = Field(default=50, ge=1, le=MAX_ROWS)


class AcknowledgeBody(Schema, extra="forbid"):
    """What one found or does."""

    note: str = Field(default="", max_length=500, pattern=STORABLE)


class RuleView(Schema):
    """When an alert fires."""

    id: int
    name: str
    kind: str = Field(description=f"One of {', '.join(KINDS)}.")
    description: str
    unit: str
    falls: bool = Field(description="Whether it fires under the threshold, rather than over it.")
    model: str = Field(description="Empty: all models but those with a rule of the same kind and severity.")
    severity: SeverityName
    threshold: float
    window_s: int = Field(description="How far back the figure goes; 0 where it is of this moment.")
    short_window_s: int = Field(description="A burn rate must be over the threshold here too.")
    hold_s: int = Field(description="Pending for so long before it fires.")
    clear_s: int = Field(description="Good for so long before it resolves.")
    enabled: bool
    firing: int = Field(description="Alerts of this rule that fire now.")


class RuleBody(Schema, extra="forbid"):
    """A change of a rule: what is absent stays."""

    model: str | None = Field(default=None, max_length=128, pattern=STORABLE)
    severity: SeverityName | None = None
    threshold: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    window_s: int | None = Field(default=None, ge=0, le=MAX_WINDOW_S)
    short_window_s: int | None = Field(default=None, ge=0, le=MAX_WINDOW_S)
    hold_s: int | None = Field(default=None, ge=0, le=MAX_HOLD_S)
    clear_s: int | None = Field(default=None, ge=0, le=MAX_CLEAR_S)
    enabled: bool | None = None
    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE, description="Why; kept in the audit trail.")


class ChannelView(Schema):
    """Where notices go, and how they fare."""

    name: str
    kind: Literal["webhook", "email"]
    target: str = Field(description="A webhook's host, or addresses.")
    min_severity: SeverityName
    enabled: bool
    waiting: int
    given_up: int
    last_delivered_at: datetime | None
    last_error: str = Field(description="Why the last try failed of what is not delivered.")


@router.get("/alerts", response=AlertsPage, summary="What fires, and what did")
def read_alerts(request: HttpRequest, query: Annotated[AlertsQuery, Query()]) -> AlertsPage:
    """For signed-in viewers."""
    after = read_cursor(query.after)
    wanted = AlertFilter(
        state=query.state,
        severity=query.severity,
        model=without_nul(query.model),
        subject=without_nul(query.subject),
        rule=without_nul(query.rule),
        since=aware(query.since, "since"),
        until=aware(query.until, "until"),
    )
    page = list_alerts(wanted, after=after, limit=query.limit)
    return AlertsPage(alerts=[_alert(row) for row in page.rows], next_after=str(page.next) if page.next else None)


@router.post(
    "/alerts/{alert_id}/acknowledge", response=AlertView, auth=OperatorAuth(), summary="Say that one sees to an alert"
)
def acknowledge_alert(request: HttpRequest, alert_id: int, body: AcknowledgeBody) -> AlertView:
    """For operators. It goes on firing until what is wrong is mended; a second acknowledgement replaces the first."""
    try:
        return _alert(acknowledge(alert_id=_row_id(alert_id), note=body.note, actor=_user(request)))
    except Alert.DoesNotExist:
        raise NotFound("There is no such alert.", code="alert_not_found") from None
    except AlertError as error:
        raise InvalidRequest(str(error), code="alert_not_firing") from error


@router.get("/alert-rules", response=list[RuleView], summary="When alerts fire")
def read_rules(request: HttpRequest) -> list[RuleView]:
    """For signed-in viewers; by name."""
    return [_rule(row, row.num_firing) for row in list_rules()]  # type: ignore[attr-defined]


@router.patch("/alert-rules/{rule_id}", response=RuleView, auth=OperatorAuth(), summary="Change a rule")
def edit_rule(request: HttpRequest, rule_id: int, body: RuleBody) -> RuleView:
    """For operators. It holds from the next look on, within seconds."""
    changes: dict[str, Any] = {
        name: value for name, value in body.dict().items() if name != "reason" and value is not None
    }
    try:
        rule = change_rule(rule_id=_row_id(rule_id), changes=changes, actor=_user(request), reason=body.reason)
    except AlertRule.DoesNotExist:
        raise NotFound("There is no such rule.", code="alert_rule_not_found") from None
    except ValidationError as error:
        field, sentences = next(iter(error.message_dict.items()))
        raise InvalidRequest(" ".join(sentences), param=field) from error
    return _rule(rule, rule.alerts.filter(state=Alert.State.FIRING).count())


@router.get("/alert-channels", response=list[ChannelView], summary="Where notices go, and how they fare")
def read_channels(request: HttpRequest) -> list[ChannelView]:
    """For signed-in viewers. Secrets and paths of webhooks are not shown; administrators change channels in Admin."""
    names = [name for name in ChannelView.model_fields if name != "target"]
    return [
        ChannelView(target=row.shown_target, **{name: getattr(row, name) for name in names}) for row in list_channels()
    ]


def _alert(row: Alert) -> AlertView:
    names = [name for name in AlertView.model_fields if name != "rule"]
    return AlertView(rule=row.rule_name, **{name: getattr(row, name) for name in names})


def _rule(row: AlertRule, firing: int) -> RuleView:
    names = [name for name in RuleView.model_fields if name not in ("description", "firing")]
    values = {name: getattr(row, name) for name in names}
    return RuleView(description=KINDS[row.kind].description, firing=firing, **values)


def _row_id(number: int) -> int:
    """An id that the database can be asked for; 0 is nobody's."""
    return number if 0 < number < 2**63 else 0


def _user(request: HttpRequest) -> User:
    user = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    return user
