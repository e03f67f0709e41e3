"""Admin of deployments, replicas and history: to read, and to offer or withdraw a model."""
# mypy: disable-error-code="misc,untyped-decorator"
# (the theme comes without types)

from collections.abc import Iterable
from typing import Any, get_args

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.forms import ModelForm
from django.http import HttpRequest
from django.urls import reverse
from unfold.contrib.filters.admin import DropdownFilter, FieldTextFilter, RangeDateTimeFilter
from unfold.decorators import action, display

from inference import admin_replicas as admin_replicas
from inference.messages import FinishReason
from inference.models import BatchRecord, HistoryCheckpoint, ModelDeployment, Replica, RequestRecord
from inference.services import save_deployment
from inference.upstream_form import FIELDS, UpstreamForm
from scheduling.admin_base import ReadOnlyAdmin, signed_in
from scheduling.admin_reason import reason_of
from scheduling.models import Tenant

STATES = {
    "ready": "success", "paused": "warning", "draining": "warning", "unhealthy": "danger", "failed": "danger",
    "lost": "danger",
}  # fmt: skip


class _NameFilter(DropdownFilter):
    """Choices from a small table: the distinct values of millions of rows would take minutes to find."""

    names: QuerySet[Any, str]

    def lookups(self, request: HttpRequest, model_admin: Any) -> Iterable[tuple[str, str]]:
        return [(name, name) for name in self.names.all()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = self.value()
        return queryset.filter(**{self.parameter_name: value}) if value else queryset


class TenantFilter(_NameFilter):
    """History of one tenant."""

    title = parameter_name = "tenant"
    names = Tenant.objects.values_list("name", flat=True)


class ModelFilter(_NameFilter):
    """What is of one model."""

    title = parameter_name = "model"
    names = ModelDeployment.objects.values_list("name", flat=True)


class ReplicaFilter(_NameFilter):
    """History of one replica."""

    title = parameter_name = "replica"
    names = Replica.objects.values_list("name", flat=True)


class FinishFilter(DropdownFilter):
    """How requests ended."""

    title = "finish reason"
    parameter_name = "finish_reason"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Iterable[tuple[str, str]]:
        return [(reason, reason) for reason in get_args(FinishReason)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(finish_reason=self.value()) if self.value() else queryset


@admin.register(ModelDeployment)
class ModelDeploymentAdmin(ReadOnlyAdmin):
    """Models and how they are served. Those of other servers are made and changed here, too."""

    form = UpstreamForm
    list_display = [
        "name",
        "status",
        "served",
        "architecture",
        "parameters",
        "mode",
        "max_batch_size",
        "sizing",
        "dtype",
        "created_at",
    ]
    search_fields = ["name", "path", "architecture"]
    search_help_text = "Name, path or architecture"
    list_filter = ["enabled", "backend", "mode"]
    actions = ["offer", "withdraw"]

    @display(description="served by", ordering="backend")
    def served(self, row: ModelDeployment) -> str:
        return row.upstream_url if row.is_upstream else "engine"

    def has_add_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("inference.add_modeldeployment")

    def has_change_permission(self, request: HttpRequest, obj: ModelDeployment | None = None) -> bool:
        """A checkpoint's deployment is changed where its files are."""
        return request.user.has_perm("inference.change_modeldeployment") and obj is not None and obj.is_upstream

    def get_fields(self, request: HttpRequest, obj: ModelDeployment | None = None) -> Any:
        if obj is None or obj.is_upstream:
            return FIELDS
        names = [field.name for field in ModelDeployment._meta.fields if not field.primary_key]
        return [name for name in names if not name.startswith("upstream")]

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        """A checkpoint's fields are called what they are."""
        if obj is not None and not obj.is_upstream:
            kwargs["form"] = ModelForm
        return super().get_form(request, obj, change=change, **kwargs)

    def save_model(self, request: HttpRequest, obj: ModelDeployment, form: Any, change: bool) -> None:
        """Audited and published as by the command."""
        changes = {name: form.cleaned_data[name] for name in FIELDS}
        if change:
            row = ModelDeployment.objects.select_for_update().get(pk=obj.pk)
            changes = {name: value for name, value in changes.items() if getattr(row, name) != value}
            save_deployment(deployment=row, changes=changes, actor=signed_in(request), reason=reason_of(request))
            return
        changes["backend"] = obj.backend
        given: dict[str, Any] = {"actor": signed_in(request), "reason": reason_of(request)}
        save_deployment(deployment=obj, changes=changes, action="deployment.create", **given)

    @display(description="status", ordering="enabled", label={"offered": "success", "withdrawn": "default"})
    def status(self, row: ModelDeployment) -> str:
        return "offered" if row.enabled else "withdrawn"

    @display(description="parameters", ordering="num_parameters")
    def parameters(self, row: ModelDeployment) -> str:
        return f"{row.num_parameters / 1e6:,.1f}M" if row.num_parameters else "-"

    def has_switch_permission(self, request: HttpRequest) -> bool:
        """The table is read-only; this is asked for its two actions."""
        return request.user.has_perm("inference.change_modeldeployment")

    @action(description="Offer to clients", permissions=["switch"])
    def offer(self, request: HttpRequest, queryset: QuerySet[ModelDeployment]) -> None:
        self._set_enabled(request, queryset, True)

    @action(description="Withdraw from clients", permissions=["switch"])
    def withdraw(self, request: HttpRequest, queryset: QuerySet[ModelDeployment]) -> None:
        self._set_enabled(request, queryset, False)

    def _set_enabled(self, request: HttpRequest, queryset: QuerySet[ModelDeployment], enabled: bool) -> None:
        for row in queryset.exclude(enabled=enabled):
            given: dict[str, Any] = {"actor": signed_in(request), "reason": reason_of(request)}
            save_deployment(deployment=row, changes={"enabled": enabled}, **given)
        self.message_user(request, "Offered." if enabled else "Withdrawn.", messages.SUCCESS)


@admin.register(Replica)
class ReplicaAdmin(ReadOnlyAdmin):
    """Gpu workers that were heard of."""

    list_display = ["name", "status", "model", "host", "device", "started_at", "last_seen_at"]
    search_fields = ["name", "host", "model"]
    search_help_text = "Name, host or model"
    list_filter = ["state", ModelFilter]

    @display(description="state", ordering="state", label=STATES)
    def status(self, row: Replica) -> str:
        return row.state


@admin.register(RequestRecord)
class RequestRecordAdmin(ReadOnlyAdmin):
    """Requests that ended."""

    list_display = [
        "finished_at", "request_id", "tenant", "model", "priority", "ended", "tokens", "ttft", "e2e", "replica",
        "policy",
    ]  # fmt: skip
    search_fields = ["=request_id"]
    search_help_text = "Request id"
    list_filter = [
        ("finished_at", RangeDateTimeFilter), TenantFilter, ModelFilter, FinishFilter, "priority",
        ("error_code", FieldTextFilter),
    ]  # fmt: skip
    list_filter_submit = True
    exclude = ["timeline"]

    def view_on_site(self, row: RequestRecord) -> str:
        """The dashboard's page of the request, which draws its timeline."""
        return reverse("request", args=[row.request_id])

    @display(
        description="ended",
        ordering="finish_reason",
        label={"stop": "success", "length": "success", "cancelled": "default", "error": "danger"},
    )
    def ended(self, row: RequestRecord) -> tuple[str, str]:
        return row.finish_reason, row.error_code or row.finish_reason

    @display(description="tokens in, out", ordering="completion_tokens")
    def tokens(self, row: RequestRecord) -> str:
        return f"{row.prompt_tokens:,} + {row.completion_tokens:,}"

    @display(description="first token")
    def ttft(self, row: RequestRecord) -> str:
        return "-" if row.ttft_s is None else _duration(row.ttft_s)

    @display(description="end to end")
    def e2e(self, row: RequestRecord) -> str:
        return _duration(row.e2e_s)


@admin.register(BatchRecord)
class BatchRecordAdmin(ReadOnlyAdmin):
    """Seconds of replicas."""

    list_display = [
        "second", "replica", "model", "steps", "batch", "tokens", "step_time", "kv", "preemptions", "mode", "policy",
    ]  # fmt: skip
    list_filter = [("second", RangeDateTimeFilter), ReplicaFilter, ModelFilter]
    list_filter_submit = True
    fields = [
        "second", "replica", "model", "mode", "policy", "policy_revision", "steps", "batch", "max_batch_size", "sizing",
        "trigger_reason", "tokens", "prefix", "drafts", "step_time", "kv", "preemptions", "device", "utilization",
    ]  # fmt: skip

    @display(description="tokens in, out", ordering="output_tokens")
    def tokens(self, row: BatchRecord) -> str:
        return f"{row.prompt_tokens:,} + {row.output_tokens:,}"

    @display(description="batch (mean, max)", ordering="batch_size_mean")
    def batch(self, row: BatchRecord) -> str:
        return f"{row.batch_size_mean:.1f}, {row.batch_size_max}"

    @display(description="step (mean, max)", ordering="step_ms_mean")
    def step_time(self, row: BatchRecord) -> str:
        return f"{row.step_ms_mean:.1f}, {row.step_ms_max:.0f} ms"

    @display(description="KV cache")
    def kv(self, row: BatchRecord) -> str:
        return f"{row.kv_blocks_used / row.kv_blocks_total:.0%}" if row.kv_blocks_total else "-"

    @display(description="prompt tokens found in the cache")
    def prefix(self, row: BatchRecord) -> str:
        return f"{row.prefix_hit_tokens:,} of {row.prefix_tokens:,}"

    @display(description="guessed tokens that were right")
    def drafts(self, row: BatchRecord) -> str:
        return f"{row.accepted_tokens:,} of {row.draft_tokens:,}"

    @display(description="utilization")
    def utilization(self, row: BatchRecord) -> str:
        return "-" if row.utilization_percent is None else f"{row.utilization_percent:.0f} %"


@admin.register(HistoryCheckpoint)
class HistoryCheckpointAdmin(ReadOnlyAdmin):
    """How far history is written."""

    list_display = ["stream", "last_id", "num_events", "num_malformed", "updated_at"]


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
