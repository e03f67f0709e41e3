"""Sends a notice as an e-mail, by the mail server of the settings."""

from collections.abc import Mapping, Sequence
from smtplib import SMTPException
from typing import Any

from django.conf import settings
from django.core.mail import EmailMessage

from dashboard.alerts.webhook import DeliveryError

MAX_SUBJECT = 180


def mail_notice(addresses: Sequence[str], payload: Mapping[str, Any]) -> None:
    """One try. Raises DeliveryError. The Message-ID is the notice's, so that a mailbox can tell what came twice."""
    if not settings.EMAIL_HOST:
        raise DeliveryError("No mail server is set: give PENSTOCK_EMAIL_HOST, and restart.")
    message = EmailMessage(
        subject=_subject(payload),
        body=_body(payload),
        to=list(addresses),
        headers={"Message-ID": f"<{payload['id']}@penstock>", "Auto-Submitted": "auto-generated"},
    )
    try:
        message.send()
    except (SMTPException, OSError, ValueError) as error:
        raise DeliveryError(f"The mail server did not take it ({type(error).__name__}).") from error


def _subject(payload: Mapping[str, Any]) -> str:
    """One line: a name may hold anything, and a line break would begin another header."""
    alert = payload.get("alert")
    if not alert:
        return "[Penstock] test"
    about = f"{alert['subject']} on {alert['model']}" if alert["subject"] else alert["model"]
    line = f"[Penstock] {payload['event']}: {alert['rule']}, {about} ({alert['severity']})"
    return " ".join(line.split())[:MAX_SUBJECT]


def _body(payload: Mapping[str, Any]) -> str:
    lines = [payload["text"], ""]
    if alert := payload.get("alert"):
        lines += [
            f"Rule: {alert['rule']} ({alert['severity']})",
            f"Value: {alert['value']:.4g} {alert['unit']}, threshold {alert['threshold']:g}",
            f"Since: {alert['started_at']}",
            f"Resolved: {alert['resolved_at']}" if alert["resolved_at"] else "",
        ]
    return "\n".join([*lines, "", payload["link"], f"Notice {payload['id']}", ""])
