"""Admin of tenants with their quotas, targets and keys; revisions and the audit trail to read."""
# mypy: disable-error-code="misc,untyped-decorator"
# (the theme comes without types)

from typing import Any

from django.contrib import admin, messages
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin, StackedInline, TabularInline
from unfold.contrib.filters.admin import AutocompleteSelectFilter, RangeDateTimeFilter
from unfold.decorators import action, display

from scheduling import services
from scheduling.admin_base import (
    AuditedAdmin,
    ReadOnlyAdmin,
    record_deletion,
    record_form,
    show_change,
    show_key,
    show_values,
    signed_in,
    values_of,
)
from scheduling.admin_exchange import ExchangeAdmin
from scheduling.admin_reason import reason_of
from scheduling.models import ApiKey, OperatorAction, PolicyRevision, Quota, ServiceLevel, Tenant

MAX_ROTATED = 5
"""Keys are shown in messages, which travel in a cookie; more than this would not fit."""


class QuotaInline(StackedInline):
    """A tenant's limits."""

    model = Quota
    can_delete = False
    min_num = max_num = 1
    fields = [("rpm", "concurrency"), ("tpm", "tpd"), "max_priority"]


class ServiceLevelInline(TabularInline):
    """A tenant's own latency targets."""

    model = ServiceLevel
    extra = 0
    fields = ["priority", "ttft_ms", "tpot_ms", "e2e_ms", "objective_percent"]
    verbose_name = "latency target"
    verbose_name_plural = "latency targets (empty: the defaults for all tenants)"


class ApiKeyInline(TabularInline):
    """A tenant's keys. A new one is shown once, above the page that follows."""

    model = ApiKey
    extra = 0
    can_delete = False
    show_change_link = True
    fields = ["name", "max_priority", "shown", "created_at", "revoked_at"]
    readonly_fields = ["shown", "created_at", "revoked_at"]

    @display(description="key")
    def shown(self, key: ApiKey) -> str:
        return key.shown if key.pk else "shown once, after saving"


@admin.register(Tenant)
class TenantAdmin(ExchangeAdmin):
    """Teams that send requests."""

    list_display = [
        "name", "display_name", "status", "weight", "rpm", "tpm", "concurrency", "ceiling", "num_keys",
    ]  # fmt: skip
    search_fields = ["name", "display_name", "keys__prefix"]
    search_help_text = "Name, or the eight characters after ps- of a key"
    list_filter = ["suspended", "quota__max_priority"]
    list_select_related = ["quota"]
    fields = [("name", "display_name"), ("weight", "suspended"), "drop_expired"]
    inlines = [QuotaInline, ServiceLevelInline, ApiKeyInline]
    actions = ["suspend", "resume"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Tenant]:
        active = Count("keys", filter=Q(keys__revoked_at=None))
        rows: QuerySet[Tenant] = super().get_queryset(request)
        return rows.annotate(num_active_keys=active)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["name"] if obj else []

    @display(description="status", ordering="suspended", label={"active": "success", "suspended": "danger"})
    def status(self, tenant: Tenant) -> str:
        return "suspended" if tenant.suspended else "active"

    @display(description="requests/min", ordering="quota__rpm")
    def rpm(self, tenant: Tenant) -> str:
        return _limit(tenant, "rpm")

    @display(description="tokens/min", ordering="quota__tpm")
    def tpm(self, tenant: Tenant) -> str:
        return _limit(tenant, "tpm")

    @display(description="concurrent", ordering="quota__concurrency")
    def concurrency(self, tenant: Tenant) -> str:
        return _limit(tenant, "concurrency")

    @display(description="ceiling", ordering="quota__max_priority")
    def ceiling(self, tenant: Tenant) -> str:
        return tenant.quota.get_max_priority_display() if hasattr(tenant, "quota") else "high"

    @display(description="keys", ordering="num_active_keys")
    def num_keys(self, tenant: Any) -> int:
        return int(tenant.num_active_keys)

    def save_model(self, request: HttpRequest, obj: Tenant, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if "weight" in form.changed_data:
            services.weight_changed(obj)

    def values_of(self, row: Tenant) -> dict[str, Any]:
        """With what goes with it."""
        values = super().values_of(row)
        values["quota"] = values_of(row.quota) if hasattr(row, "quota") else {}
        values["service_levels"] = [values_of(level) for level in row.service_levels.order_by("priority")]
        values["keys"] = [key.shown for key in row.keys.filter(revoked_at=None)]
        return values

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        """Save quota, targets and keys, each with its line in the audit trail."""
        is_new = {id(f.instance): f.instance.pk is None for f in formset.forms}
        for row in formset.save(commit=False):
            if isinstance(row, ApiKey) and row.pk is None:
                _issue(self, request, row)
            else:
                row.save()
        for row in formset.deleted_objects:
            record_deletion(request, row, values_of(row))
            row.delete()
        formset.save_m2m()
        for row_form in formset.forms:
            created = is_new[id(row_form.instance)]
            unsaved = row_form in getattr(formset, "deleted_forms", []) or row_form.instance.pk is None
            if unsaved or not row_form.has_changed() or (created and isinstance(row_form.instance, ApiKey)):
                continue
            record_form(request, row_form, target=form.instance.name, created=created)
        if formset.has_changed():
            services.config_changed()

    @action(description="Suspend: refuse their requests", permissions=["change"])
    def suspend(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        for tenant in queryset:
            services.suspend_tenant(tenant=tenant, actor=signed_in(request), reason=reason_of(request))
        self.message_user(request, "Suspended. Their requests are refused from now on.", messages.SUCCESS)

    @action(description="Resume: let their requests in again", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[Tenant]) -> None:
        for tenant in queryset:
            services.resume_tenant(tenant=tenant, actor=signed_in(request), reason=reason_of(request))
        self.message_user(request, "Resumed. Their requests are let in again.", messages.SUCCESS)


@admin.register(ApiKey)
class ApiKeyAdmin(AuditedAdmin):
    """Keys of all tenants."""

    list_display = ["shown_key", "tenant", "name", "ceiling", "status", "created_at", "revoked_at"]
    list_filter = [("tenant", AutocompleteSelectFilter), ("revoked_at", admin.EmptyFieldListFilter)]
    list_filter_submit = True
    list_select_related = ["tenant"]
    search_fields = ["prefix", "name", "tenant__name"]
    search_help_text = "The eight characters after ps-, name, tenant"
    autocomplete_fields = ["tenant"]
    actions = ["rotate", "revoke"]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["tenant", "shown_key", "created_at", "revoked_at"] if obj else []

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["tenant", "name", "max_priority", *(["shown_key", "created_at", "revoked_at"] if obj else [])]

    @display(description="key", ordering="prefix")
    def shown_key(self, key: ApiKey) -> str:
        return key.shown

    @display(description="ceiling", ordering="max_priority")
    def ceiling(self, key: ApiKey) -> str:
        return "the tenant's" if key.max_priority is None else str(key.get_max_priority_display())

    @display(description="status", label={"active": "success", "revoked": "danger"})
    def status(self, key: ApiKey) -> str:
        return "active" if key.active else "revoked"

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            super().save_model(request, obj, form, change)
        else:
            _issue(self, request, obj)

    @action(description=f"Rotate: revoke, and show a new key ({MAX_ROTATED} at most)", permissions=["change"])
    def rotate(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> None:
        active = list(queryset.filter(revoked_at=None).select_related("tenant"))
        if not 0 < len(active) <= MAX_ROTATED:
            self.message_user(request, f"Choose one to {MAX_ROTATED} keys that are not revoked.", messages.ERROR)
            return
        for key in active:
            plaintext = services.rotate_key(key=key, actor=signed_in(request), reason=reason_of(request))
            self.message_user(request, show_key(plaintext, f"{key.tenant.name}, {key.name}"), messages.SUCCESS)

    @action(description="Revoke: refuse requests with them", permissions=["change"])
    def revoke(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> None:
        for key in queryset.select_related("tenant"):
            services.revoke_key(key=key, actor=signed_in(request), reason=reason_of(request))
        self.message_user(request, "Revoked. Requests with these keys are refused from now on.", messages.SUCCESS)


@admin.register(ServiceLevel)
class ServiceLevelAdmin(AuditedAdmin):
    """Latency targets of all tenants, and the defaults."""

    list_display = ["owner", "priority", "ttft_ms", "tpot_ms", "e2e_ms", "objective_percent"]
    list_filter = [("tenant", AutocompleteSelectFilter), "priority"]
    list_filter_submit = True
    list_select_related = ["tenant"]
    search_fields = ["tenant__name", "tenant__display_name"]
    search_help_text = "Tenant"
    autocomplete_fields = ["tenant"]

    @display(description="tenant", ordering="tenant__name")
    def owner(self, level: ServiceLevel) -> str:
        return str(level.tenant or "all without their own")


@admin.register(PolicyRevision)
class PolicyRevisionAdmin(ReadOnlyAdmin):
    """Switches of policy: who, when, from, to, why, and how it went."""

    list_display = ["created_at", "model", "revision", "change", "actor_name", "reason", "status", "moved", "acks"]
    list_filter = ["state", "name"]
    search_fields = ["model", "name", "actor_name", "reason"]
    search_help_text = "Model, policy, who, or why"
    fields = [
        "created_at", "model", "revision", "change", "former", "new", "actor_name", "reason", "state", "applied_at",
        "moved", "told", "error",
    ]  # fmt: skip

    @display(description="policy")
    def change(self, row: PolicyRevision) -> str:
        return f"{row.previous_name or 'fifo'} → {row.name}"

    @display(
        description="state",
        ordering="state",
        label={"applied": "success", "pending": "warning", "applying": "info", "superseded": "default"},
    )
    def status(self, row: PolicyRevision) -> str:
        return row.state

    @display(description="parameters before")
    def former(self, row: PolicyRevision) -> str:
        return show_values(row.previous_params)

    @display(description="parameters")
    def new(self, row: PolicyRevision) -> str:
        return show_values(row.params)

    @display(description="workers")
    def told(self, row: PolicyRevision) -> str:
        return show_values(row.acknowledgements)

    @display(description="requests moved", ordering="num_moved")
    def moved(self, row: PolicyRevision) -> str:
        if row.num_moved is None or row.seconds is None:
            return "-"
        return f"{row.num_moved} in {row.seconds * 1000:.0f} ms"

    @display(description="workers")
    def acks(self, row: PolicyRevision) -> str:
        taken = sum(bool(ack.get("ok")) for ack in row.acknowledgements.values() if isinstance(ack, dict))
        return f"{taken} of {len(row.acknowledgements)}" if row.acknowledgements else "-"


@admin.register(OperatorAction)
class OperatorActionAdmin(ReadOnlyAdmin):
    """The audit trail."""

    list_display = ["created_at", "actor_name", "origin", "action", "target", "changes", "reason"]
    list_filter = [("created_at", RangeDateTimeFilter), "action"]
    list_filter_submit = True
    search_fields = ["actor_name", "action", "target", "reason", "=address", "=token"]
    search_help_text = "Who, action, target or why; an address or a token in full"
    fields = ["created_at", "actor_name", "address", "token", "action", "target", "old", "new", "reason"]

    @display(description="from", ordering="address")
    def origin(self, row: OperatorAction) -> str:
        return row.shown_origin or "-"

    @display(description="change")
    def changes(self, row: OperatorAction) -> str:
        return show_change(row.before, row.after)

    @display(description="before")
    def old(self, row: OperatorAction) -> str:
        return show_values(row.before)

    @display(description="after")
    def new(self, row: OperatorAction) -> str:
        return show_values(row.after)


def _issue(model_admin: ModelAdmin, request: HttpRequest, key: ApiKey) -> None:
    plaintext = services.issue_key(key=key, actor=signed_in(request), reason=reason_of(request))
    model_admin.message_user(request, show_key(plaintext, f"{key.tenant.name}, {key.name}"), messages.SUCCESS)


def _limit(tenant: Tenant, name: str) -> str:
    value = getattr(tenant.quota, name) if hasattr(tenant, "quota") else None
    return "no limit" if value is None else f"{value:,}"
