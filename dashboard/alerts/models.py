"""Alerts in the database: rules, firings, channels, and the notices with their deliveries."""

import uuid
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import validate_email
from django.db import models
from django.db.models import Q

from dashboard.alerts.address import AddressError, check_url
from dashboard.alerts.kinds import KINDS, SEVERITIES, Rule, find_problems
from inference.models import ModelDeployment

MAX_RULES = 100
MAX_CHANNELS = 20
MAX_RECIPIENTS = 20


class Severity(models.TextChoices):
    """From the least to the gravest."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return SEVERITIES.index(self.value)


class AlertRule(models.Model):
    """When to say that something is wrong. A rule of one model goes before those of all, of its kind and severity."""

    name = models.CharField(max_length=80, unique=True)
    kind = models.CharField(max_length=16, choices=[(name, kind.title) for name, kind in KINDS.items()])
    model = models.CharField(
        max_length=128,
        blank=True,
        help_text="Empty: all models. A rule of one model takes the place of those of all models that have the same "
        "kind and severity.",
    )
    severity = models.CharField(max_length=8, choices=Severity.choices, default=Severity.WARNING)
    threshold = models.FloatField(help_text="In the unit of its kind.")
    window_s = models.PositiveIntegerField("window (s)", default=0, help_text="How far back the figure goes.")
    short_window_s = models.PositiveIntegerField(
        "short window (s)", default=0, help_text="Burn rates must be over the threshold in this window too."
    )
    hold_s = models.PositiveIntegerField("hold (s)", default=60, help_text="Pending for so long before it fires.")
    clear_s = models.PositiveIntegerField(
        "resolves after (s)", default=60, help_text="The figure must have been good for so long: alerts do not flap."
    )
    enabled = models.BooleanField(default=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        """Raises ValidationError, with a sentence for each field that cannot be used."""
        problems = find_problems(self.spec())
        if "\0" in self.name + self.model:
            problems["name"] = "A name holds no NUL."
        elif sentence := self._find_unknown_model():
            problems["model"] = sentence
        if self._state.adding and AlertRule.objects.count() >= MAX_RULES:
            problems["name"] = f"There are {MAX_RULES} rules already; delete one first."
        if problems:
            raise ValidationError(problems)

    def _find_unknown_model(self) -> str:
        """A sentence where the rule would never fire; one whose model was taken away meanwhile can still be changed."""
        if not self.model or AlertRule.objects.filter(pk=self.pk, model=self.model).exists():
            return ""
        names = list(ModelDeployment.objects.order_by("name").values_list("name", flat=True))
        if self.model in names:
            return ""
        return f"There is no model {self.model[:60]!r}; choose {', '.join([*names[:10], 'or none for all'])}."

    def spec(self) -> Rule:
        """What the evaluation needs. A field that a form left empty counts as wrong, not as an error here."""
        names = ("threshold", "window_s", "short_window_s", "hold_s", "clear_s")
        values: dict[str, Any] = {name: _number(getattr(self, name)) for name in names}
        return Rule(kind=self.kind, severity=self.severity, model=self.model, **values)

    @property
    def unit(self) -> str:
        return KINDS[self.kind].unit

    @property
    def falls(self) -> bool:
        return KINDS[self.kind].falls


class Alert(models.Model):
    """One firing of a rule for a model, and a tenant or replica of it where the kind has such a subject."""

    class State(models.TextChoices):
        """`pending`: the figure is bad, for less than the hold time. Such a row is deleted if it never fires."""

        PENDING = "pending"
        FIRING = "firing"
        RESOLVED = "resolved"

    rule = models.ForeignKey(AlertRule, on_delete=models.SET_NULL, null=True, related_name="alerts")
    rule_name = models.CharField("rule", max_length=80)
    kind = models.CharField(max_length=16)
    severity = models.CharField(max_length=8, choices=Severity.choices)
    model = models.CharField(max_length=128)
    subject = models.CharField(max_length=128, blank=True, help_text="A tenant or a replica; empty: the model itself.")
    state = models.CharField(max_length=8, choices=State.choices, default=State.PENDING)
    started_at = models.DateTimeField(help_text="Since when the figure is bad.")
    seen_at = models.DateTimeField(help_text="When it was last seen to be bad.")
    fired_at = models.DateTimeField(null=True)
    clear_at = models.DateTimeField("good again since", null=True)
    resolved_at = models.DateTimeField(null=True)
    value = models.FloatField()
    threshold = models.FloatField()
    reason = models.TextField(help_text="What is wrong, and what to do next.")
    ending = models.CharField(max_length=200, blank=True, help_text="Why it resolved.")
    acknowledged_at = models.DateTimeField(null=True)
    acknowledged_by = models.CharField(max_length=150, blank=True)
    note = models.TextField(blank=True)

    class Meta:
        ordering = ["-started_at", "-id"]
        indexes = [
            models.Index(fields=["state", "severity"], name="dashboard_alert_state"),
            models.Index(fields=["-started_at", "-id"], name="dashboard_alert_started"),
            models.Index(fields=["model", "fired_at"], name="dashboard_alert_model"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["rule", "model", "subject"],
                condition=~Q(state="resolved"),
                name="dashboard_alert_one_open",
            )
        ]

    def __str__(self) -> str:
        return f"{self.rule_name}: {self.about}"

    @property
    def about(self) -> str:
        """The model, and the tenant or replica of it."""
        return f"{self.subject} on {self.model}" if self.subject else self.model

    @property
    def unit(self) -> str:
        return KINDS[self.kind].unit if self.kind in KINDS else ""

    @property
    def falls(self) -> bool:
        return self.kind in KINDS and KINDS[self.kind].falls

    @property
    def page(self) -> str:
        """URL name of the page that helps."""
        return KINDS[self.kind].page if self.kind in KINDS else "dashboard"

    @property
    def lasted_s(self) -> float | None:
        """From firing to resolving; None before."""
        return (self.resolved_at - self.fired_at).total_seconds() if self.resolved_at and self.fired_at else None


class AlertChannel(models.Model):
    """Where notices of alerts go."""

    class Kind(models.TextChoices):
        """How a notice travels."""

        WEBHOOK = "webhook"
        EMAIL = "email", "e-mail"

    name = models.CharField(max_length=80, unique=True)
    kind = models.CharField(max_length=8, choices=Kind.choices, default=Kind.WEBHOOK)
    url = models.CharField(
        "URL",
        max_length=500,
        blank=True,
        help_text="Of a webhook, http or https. Redirects are not followed. Only public addresses, and those that "
        "PENSTOCK_WEBHOOK_NETWORKS names, are connected to.",
    )
    secret = models.CharField(
        max_length=200, blank=True, help_text="Signs each notice (HMAC-SHA256, header Penstock-Signature)."
    )
    recipients = models.TextField(blank=True, help_text="Of e-mail: addresses with commas between.")
    min_severity = models.CharField(
        "from severity", max_length=8, choices=Severity.choices, default=Severity.INFO, help_text="And all graver ones."
    )
    enabled = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        """Raises ValidationError, with a sentence for each field that cannot be used."""
        problems: dict[str, str] = {}
        if "\0" in self.name + self.url + self.secret + self.recipients:
            problems["name"] = "A channel's fields hold no NUL."
        elif self.kind == self.Kind.WEBHOOK:
            try:
                check_url(self.url)
            except AddressError as error:
                problems["url"] = str(error)
        else:
            problems |= self._email_problems()
        if self._state.adding and AlertChannel.objects.count() >= MAX_CHANNELS:
            problems["name"] = f"There are {MAX_CHANNELS} channels already; delete one first."
        if problems:
            raise ValidationError(problems)

    def _email_problems(self) -> dict[str, str]:
        if not settings.EMAIL_HOST:
            return {"kind": "No mail server is set: give PENSTOCK_EMAIL_HOST, and restart."}
        if not 0 < len(self.addresses) <= MAX_RECIPIENTS:
            return {"recipients": f"Give one to {MAX_RECIPIENTS} addresses with commas between."}
        for address in self.addresses:
            try:
                validate_email(address)
            except ValidationError:
                return {"recipients": f"{address[:60]!r} is no e-mail address."}
        return {}

    @property
    def addresses(self) -> list[str]:
        """Recipients of an e-mail."""
        return [part.strip() for part in self.recipients.replace("\n", ",").split(",") if part.strip()]

    @property
    def shown_target(self) -> str:
        """What may be shown of where it goes: paths of webhooks are often secrets."""
        if self.kind == self.Kind.EMAIL:
            return ", ".join(self.addresses)
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}/…"


class Notice(models.Model):
    """Something to tell: an alert began to fire or resolved. Rows are only added; the id is what receivers compare."""

    class Event(models.TextChoices):
        """`test`: an administrator tries a channel."""

        FIRING = "firing"
        RESOLVED = "resolved"
        TEST = "test"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    alert = models.ForeignKey(Alert, on_delete=models.CASCADE, null=True, related_name="notices")
    event = models.CharField(max_length=8, choices=Event.choices)
    payload = models.JSONField(help_text="What is sent; the same at each try.")
    created_at = models.DateTimeField()

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return f"{self.event} {self.id}"


class Delivery(models.Model):
    """A notice on its way by a channel, until the channel took it or a day has passed."""

    class State(models.TextChoices):
        """`given up`: it was tried for a day."""

        WAITING = "waiting"
        DELIVERED = "delivered"
        GIVEN_UP = "given up"

    notice = models.ForeignKey(Notice, on_delete=models.CASCADE, related_name="deliveries")
    channel = models.ForeignKey(AlertChannel, on_delete=models.CASCADE, related_name="deliveries")
    state = models.CharField(max_length=9, choices=State.choices, default=State.WAITING)
    attempts = models.PositiveIntegerField(default=0)
    next_try_at = models.DateTimeField()
    delivered_at = models.DateTimeField(null=True)
    error = models.CharField(max_length=300, blank=True, help_text="Why the last try failed.")

    class Meta:
        ordering = ["-id"]
        verbose_name = "alert delivery"
        verbose_name_plural = "alert deliveries"
        indexes = [
            models.Index(fields=["state", "next_try_at"], name="dashboard_delivery_due"),
            models.Index(fields=["channel", "state"], name="dashboard_delivery_channel"),
        ]
        constraints = [models.UniqueConstraint(fields=["notice", "channel"], name="dashboard_delivery_once")]

    def __str__(self) -> str:
        return f"{self.notice.event} by {self.channel}"

    @property
    def created_at(self) -> datetime:
        return self.notice.created_at


def _number(value: Any) -> float:
    return float("nan") if value is None else value
