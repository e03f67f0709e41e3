"""Admin of alert rules and channels; alerts and deliveries to read."""
# mypy: disable-error-code="misc,untyped-decorator"
# (the theme comes without types)

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.decorators import action, display
from unfold.widgets import UnfoldAdminPasswordWidget, UnfoldAdminSelectWidget

from dashboard.alerts.judging import span
from dashboard.alerts.kinds import KINDS
from dashboard.alerts.models import Alert, AlertChannel, AlertRule, Delivery
from dashboard.alerts.services import send_again, try_channel
from inference.models import ModelDeployment
from scheduling.admin_base import AuditedAdmin, ReadOnlyAdmin, signed_in
from scheduling.admin_reason import reason_of
from scheduling.audit import record_action

SEVERITIES = {"critical": "danger", "warning": "warning", "info": "info"}
STATES = {"firing": "danger", "pending": "warning", "resolved": "success"}
DELIVERIES = {"waiting": "warning", "delivered": "success", "given up": "danger"}
SECRETS = ("url", "secret")
"""Fields of a channel that the audit trail, which viewers read, does not hold."""


@admin.register(AlertRule)
class AlertRuleAdmin(AuditedAdmin):
    """When alerts fire."""

    list_display = ["name", "status", "grade", "condition", "hold", "models"]
    list_filter = ["kind", "severity", "enabled"]
    search_fields = ["name", "model"]
    search_help_text = "Name or model"
    fields = [
        ("name", "enabled"),
        ("kind", "severity"),
        ("threshold", "model"),
        ("window_s", "short_window_s"),
        ("hold_s", "clear_s"),
    ]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["kind"] if obj else []

    def formfield_for_dbfield(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        field = super().formfield_for_dbfield(db_field, request, **kwargs)
        if db_field.name == "model":
            known = {*ModelDeployment.objects.values_list("name", flat=True)}
            names = sorted(known | {*AlertRule.objects.exclude(model="").values_list("model", flat=True)})
            field.widget = UnfoldAdminSelectWidget(choices=[("", "all models"), *((name, name) for name in names)])
        if db_field.name == "threshold":
            field.help_text = "; ".join(f"{kind.title}: {kind.unit}" for kind in KINDS.values())
        return field

    @display(description="status", ordering="enabled", label={"on": "success", "off": "default"})
    def status(self, rule: AlertRule) -> str:
        return "on" if rule.enabled else "off"

    @display(description="severity", ordering="severity", label=SEVERITIES)
    def grade(self, rule: AlertRule) -> str:
        return rule.severity

    @display(description="fires when")
    def condition(self, rule: AlertRule) -> str:
        windows = " and ".join(span(s) for s in (rule.window_s, rule.short_window_s) if s)
        side = "under" if rule.falls else "over"
        over = f", over {windows}" if windows else ""
        return f"{rule.get_kind_display()} {side} {rule.threshold:g} {rule.unit}{over}"

    @display(description="for", ordering="hold_s")
    def hold(self, rule: AlertRule) -> str:
        return span(rule.hold_s)

    @display(description="models", ordering="model")
    def models(self, rule: AlertRule) -> str:
        return rule.model or "all"


class ChannelForm(forms.ModelForm):  # type: ignore[type-arg]
    """The secret is written and never shown: empty keeps what there is."""

    secret = forms.CharField(
        required=False,
        strip=False,
        max_length=200,
        widget=UnfoldAdminPasswordWidget(attrs={"autocomplete": "new-password"}),
        help_text="Signs each notice (HMAC-SHA256, header Penstock-Signature). Empty: what is set stays.",
    )
    unsigned = forms.BooleanField(required=False, label="Forget the secret", help_text="Notices go unsigned.")

    class Meta:
        model = AlertChannel
        fields = ["name", "enabled", "kind", "min_severity", "url", "secret", "recipients"]

    def clean_secret(self) -> str:
        """What was typed, else what there was."""
        typed: str = self.cleaned_data.get("secret") or ""
        return typed or self.instance.secret

    def clean(self) -> dict[str, Any]:
        """Raises nothing; the model's own `clean` says what is wrong."""
        found: dict[str, Any] = super().clean() or self.cleaned_data
        if found.get("unsigned"):
            found["secret"] = ""
        return found


@admin.register(AlertChannel)
class AlertChannelAdmin(AuditedAdmin):
    """Where notices go."""

    form = ChannelForm
    list_display = ["name", "status", "kind", "target", "min_severity", "signed"]
    list_filter = ["kind", "enabled"]
    search_fields = ["name"]
    search_help_text = "Name"
    fields = [
        ("name", "enabled"),
        ("kind", "min_severity"),
        "url",
        ("secret", "unsigned"),
        "recipients",
    ]
    actions = ["send_test"]

    def get_fields(self, request: HttpRequest, obj: AlertChannel | None = None) -> Any:
        """Who may only look sees no secret, and of a webhook its host alone, as on the page of alerts."""
        if obj is None or self.has_change_permission(request, obj):
            return super().get_fields(request, obj)
        return [("name", "enabled"), ("kind", "min_severity"), "target"]

    @display(description="status", ordering="enabled", label={"on": "success", "off": "default"})
    def status(self, channel: AlertChannel) -> str:
        return "on" if channel.enabled else "off"

    @display(description="to")
    def target(self, channel: AlertChannel) -> str:
        return channel.shown_target

    @display(description="signed", boolean=True)
    def signed(self, channel: AlertChannel) -> bool:
        return bool(channel.secret)

    def save_model(self, request: HttpRequest, obj: AlertChannel, form: Any, change: bool) -> None:
        """Save, and write down what changed without what must stay secret."""
        obj.save()
        names = list(ChannelForm.Meta.fields)
        if change:
            names = [name for name in names if form.initial.get(name) != getattr(obj, name)]
        if not names:
            return
        after = {name: _shown(obj, name) for name in names}
        before = {name: "(former)" if name in SECRETS else form.initial.get(name) for name in names} if change else {}
        record_action(
            actor=signed_in(request),
            action=f"alertchannel.{'update' if change else 'create'}",
            target=obj.name,
            before=before,
            after=after,
            reason=reason_of(request),
        )

    def values_of(self, row: AlertChannel) -> dict[str, Any]:
        """Without what must stay secret."""
        return {name: _shown(row, name) for name in ChannelForm.Meta.fields}

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        """What was sent by a channel is kept, so one that has sent is not deleted, and the page says what to do."""
        to_delete, counts, lacking, protected = super().get_deleted_objects(objs, request)
        for channel in objs:
            if num := channel.deliveries.count():
                told = f"Deliveries of {channel.name} that tell what was sent: {num}"
                protected = [*protected, f"{told}. Turn the channel off instead of deleting it."]
        return to_delete, counts, lacking - {Delivery._meta.verbose_name}, protected

    @action(description="Send a test notice", permissions=["change"])
    def send_test(self, request: HttpRequest, queryset: QuerySet[AlertChannel]) -> None:
        off = [channel.name for channel in queryset if not channel.enabled]
        if off:
            self.message_user(request, f"{', '.join(off)} is off: enable it first.", messages.ERROR)
            return
        for channel in queryset:
            try_channel(channel=channel, actor=signed_in(request), reason=reason_of(request))
        self.message_user(
            request, "A test notice is on its way. Whether it arrived stands in Alert deliveries.", messages.SUCCESS
        )


def _shown(channel: AlertChannel, name: str) -> Any:
    if name == "url":
        return channel.shown_target if channel.url else ""
    if name == "secret":
        return "(set)" if channel.secret else ""
    return getattr(channel, name)


@admin.register(Alert)
class AlertAdmin(ReadOnlyAdmin):
    """What fired; the dashboard's page acknowledges."""

    list_display = ["started_at", "rule_name", "grade", "about", "status", "figure", "bound", "acknowledged_by"]
    list_filter = ["state", "severity", "kind"]
    search_fields = ["=rule_name", "=model", "=subject"]
    search_help_text = "A rule, model, tenant or replica, in full"
    fields = [
        "rule_name", "severity", "model", "subject", "state", "figure", "bound", "reason", "started_at", "fired_at",
        "seen_at", "clear_at", "resolved_at", "ending", "acknowledged_at", "acknowledged_by", "note",
    ]  # fmt: skip

    @display(description="value", ordering="value")
    def figure(self, alert: Alert) -> str:
        return f"{alert.value:.4g} {alert.unit}"

    @display(description="threshold", ordering="threshold")
    def bound(self, alert: Alert) -> str:
        return f"{'under' if alert.falls else 'over'} {alert.threshold:g} {alert.unit}"

    @display(description="severity", ordering="severity", label=SEVERITIES)
    def grade(self, alert: Alert) -> str:
        return alert.severity

    @display(description="state", ordering="state", label=STATES)
    def status(self, alert: Alert) -> str:
        return alert.state


@admin.register(Delivery)
class DeliveryAdmin(ReadOnlyAdmin):
    """Notices on their way."""

    list_display = ["created_at", "channel", "event", "alert", "status", "attempts", "next_try_at", "error"]
    list_filter = ["state", "channel"]
    list_select_related = ["channel", "notice__alert"]
    search_fields = ["=notice__alert__rule_name", "=notice__alert__model", "error"]
    search_help_text = "A rule or a model in full, or an error"
    fields = ["channel", "event", "alert", "told_at", "state", "attempts", "next_try_at", "delivered_at", "error"]
    actions = ["again"]

    @display(description="created at")
    def told_at(self, delivery: Delivery) -> str:
        return f"{delivery.created_at:%Y-%m-%d %H:%M:%S}"

    @display(description="event", ordering="notice__event")
    def event(self, delivery: Delivery) -> str:
        return delivery.notice.event

    @display(description="alert")
    def alert(self, delivery: Delivery) -> str:
        return str(delivery.notice.alert or "-")

    @display(description="state", ordering="state", label=DELIVERIES)
    def status(self, delivery: Delivery) -> str:
        return delivery.state

    def has_again_permission(self, request: HttpRequest) -> bool:
        """The table is read-only; this is asked for its one action."""
        return request.user.has_perm("dashboard.change_delivery")

    @action(description="Try again what was given up", permissions=["again"])
    def again(self, request: HttpRequest, queryset: QuerySet[Delivery]) -> None:
        for delivery in queryset:
            send_again(delivery=delivery, actor=signed_in(request), reason=reason_of(request))
        self.message_user(request, "What was given up is tried again.", messages.SUCCESS)
