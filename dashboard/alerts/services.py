"""What operators do about alerts: acknowledge one, change a rule. Each is audited in its own transaction."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from dashboard.alerts.models import Alert, AlertChannel, AlertRule, Delivery, Notice
from dashboard.alerts.notices import write_test
from scheduling.audit import record_action

CHANGEABLE = ("model", "severity", "threshold", "window_s", "short_window_s", "hold_s", "clear_s", "enabled")
"""Fields of a rule that operators change; names and kinds stay, so that what an alert meant stays readable."""
ROWS_PER_DELETE = 500


class AlertError(ValueError):
    """It cannot be done; the message says why."""


def acknowledge(*, alert_id: int, note: str, actor: User) -> Alert:
    """Say that somebody sees to a firing alert. A second acknowledgement takes the place of the first.

    Raises Alert.DoesNotExist, or AlertError where it does not fire.
    """
    with transaction.atomic():
        alert = Alert.objects.select_for_update().get(pk=alert_id)
        if alert.state != Alert.State.FIRING:
            raise AlertError("This alert does not fire any more, so there is nothing to acknowledge.")
        before = {"by": alert.acknowledged_by, "note": alert.note} if alert.acknowledged_at else {}
        alert.acknowledged_at, alert.acknowledged_by = timezone.now(), actor.get_username()
        alert.note = note
        alert.save(update_fields=["acknowledged_at", "acknowledged_by", "note"])
        record_action(
            actor=actor,
            action="alert.acknowledge",
            target=str(alert)[:200],
            before=before,
            after={"by": alert.acknowledged_by, "note": note},
            reason=note,
        )
    return alert


def change_rule(*, rule_id: int, changes: Mapping[str, Any], actor: User, reason: str) -> AlertRule:
    """Change fields of a rule; open alerts are judged by it from the next look on.

    Raises AlertRule.DoesNotExist, or ValidationError with a sentence for each field that cannot be used.
    """
    with transaction.atomic():
        rule = AlertRule.objects.select_for_update().get(pk=rule_id)
        before = {name: getattr(rule, name) for name in changes}
        for name, value in changes.items():
            if name not in CHANGEABLE:
                raise AlertError(f"{name} of a rule cannot be changed.")
            setattr(rule, name, value)
        rule.full_clean()
        changed = {name: getattr(rule, name) for name in changes if getattr(rule, name) != before[name]}
        if changed:
            rule.save()
            record_action(
                actor=actor,
                action="alertrule.update",
                target=rule.name,
                before={name: before[name] for name in changed},
                after=changed,
                reason=reason,
            )
    return rule


@transaction.atomic
def try_channel(*, channel: AlertChannel, actor: User, reason: str = "") -> Delivery:
    """Send a notice that says that nothing is wrong."""
    record_action(actor=actor, action="alertchannel.test", target=channel.name, reason=reason)
    return write_test(channel, timezone.now(), actor.get_username())


@transaction.atomic
def send_again(*, delivery: Delivery, actor: User, reason: str = "") -> None:
    """Try a delivery that was given up once more, at once."""
    given_up = Delivery.objects.filter(pk=delivery.pk, state=Delivery.State.GIVEN_UP)
    if given_up.update(state=Delivery.State.WAITING, next_try_at=timezone.now()):
        record_action(
            actor=actor,
            action="delivery.retry",
            target=str(delivery)[:200],
            before={"state": Delivery.State.GIVEN_UP},
            after={"state": Delivery.State.WAITING},
            reason=reason,
        )


def prune_alerts(*, days: int, now: datetime | None = None) -> int:
    """Delete resolved alerts older than so many days, with their notices, a few at a time; how many."""
    oldest = (now or timezone.now()) - timedelta(days=days)
    rows = Alert.objects.filter(state=Alert.State.RESOLVED, resolved_at__lt=oldest)
    num = 0
    while ids := list(rows.values_list("id", flat=True)[:ROWS_PER_DELETE]):
        Alert.objects.filter(id__in=ids).delete()
        num += len(ids)
    Notice.objects.filter(event=Notice.Event.TEST, created_at__lt=oldest).delete()
    return num
