"""Notices: what is told of an alert, written down with the change it tells of, one delivery for each channel."""

import uuid
from datetime import datetime
from typing import Any

from django.conf import settings

from dashboard.alerts.models import Alert, AlertChannel, Delivery, Notice, Severity

PAYLOAD_VERSION = 1


def write_notice(alert: Alert, event: Notice.Event, now: datetime) -> Notice:
    """A notice for every channel that wants this severity. Call it in the transaction of the change."""
    notice_id = uuid.uuid4()
    notice = Notice.objects.create(
        id=notice_id, alert=alert, event=event, payload=_payload(notice_id, alert, event, now), created_at=now
    )
    rank = Severity(alert.severity).rank
    channels = [
        channel for channel in AlertChannel.objects.filter(enabled=True) if Severity(channel.min_severity).rank <= rank
    ]
    Delivery.objects.bulk_create(Delivery(notice=notice, channel=channel, next_try_at=now) for channel in channels)
    return notice


def write_test(channel: AlertChannel, now: datetime, actor_name: str) -> Delivery:
    """A notice to one channel, to see whether it arrives."""
    notice_id = uuid.uuid4()
    payload = {
        "version": PAYLOAD_VERSION,
        "id": str(notice_id),
        "event": "test",
        "created_at": now.isoformat(),
        "text": f"{actor_name} tries the channel {channel.name}. Nothing is wrong.",
        "link": page_url(),
    }
    notice = Notice.objects.create(id=notice_id, event=Notice.Event.TEST, payload=payload, created_at=now)
    return Delivery.objects.create(notice=notice, channel=channel, next_try_at=now)


def page_url() -> str:
    """The page of alerts, as readers reach it."""
    config = settings.PENSTOCK
    origin = next(iter(config.trusted_origins), "") or f"http://{config.host}:{config.port}"
    return f"{origin.rstrip('/')}/alerts/"


def _payload(notice_id: uuid.UUID, alert: Alert, event: Notice.Event, now: datetime) -> dict[str, Any]:
    """Frozen here: a try hours later says what was true when the alert changed."""
    text = alert.reason if event == Notice.Event.FIRING else alert.ending
    return {
        "version": PAYLOAD_VERSION,
        "id": str(notice_id),
        "event": event.value,
        "created_at": now.isoformat(),
        "text": text,
        "link": page_url(),
        "alert": {
            "id": alert.pk,
            "rule": alert.rule_name,
            "kind": alert.kind,
            "severity": alert.severity,
            "model": alert.model,
            "subject": alert.subject,
            "value": alert.value,
            "threshold": alert.threshold,
            "unit": alert.unit,
            "started_at": alert.started_at.isoformat(),
            "fired_at": alert.fired_at.isoformat() if alert.fired_at else None,
            "resolved_at": alert.resolved_at.isoformat() if alert.resolved_at else None,
            "acknowledged_by": alert.acknowledged_by,
        },
    }
