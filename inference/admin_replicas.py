"""Admin of the replicas that are wanted: the rows that the Fleet page and the API change, with what is wrong in one."""
# mypy: disable-error-code="misc,untyped-decorator"
# (the theme comes without types)

from typing import Any

from django import forms
from django.contrib import admin
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import OuterRef, QuerySet, Subquery
from django.http import HttpRequest
from redis.exceptions import RedisError
from unfold.decorators import display

from inference.models import Replica, WantedReplica
from inference.replicas import ReplicaError, find_machine, load_plan, place_replica, publish_wanted, read_machines
from inference.room import NoRoom
from inference.services import read_replicas
from scheduling.admin_base import AuditedAdmin
from scheduling.connection import live_keys, live_redis


class WantedReplicaForm(forms.ModelForm):  # type: ignore[type-arg]
    """Asks the machines before it wants a replica anywhere."""

    class Meta:
        model = WantedReplica
        fields = ["name", "deployment", "machine", "device", "wanted", "generation", "drain_s"]

    def clean(self) -> dict[str, Any]:
        """A replica that is placed anew needs a machine that reports, and room there. Raises ValidationError."""
        values: dict[str, Any] = super().clean() or self.cleaned_data
        placed = {"deployment", "machine", "device", "wanted"} & set(self.changed_data)
        if placed and values.get("deployment") and values.get("machine") and values.get("wanted") == "running":
            self._place(values)
        return values

    def _place(self, values: dict[str, Any]) -> None:
        try:
            client, keys = live_redis(), live_keys()
            machine = find_machine(read_machines(client, keys), values["machine"])
            plan = load_plan()
            plan.replicas.pop(values.get("name", ""), None)
            statuses = {status.replica: status for status in read_replicas(client, keys)}
            device = values.get("device") or "auto"
            found = place_replica(
                deployment=values["deployment"], machine=machine, device=device, plan=plan, statuses=statuses
            )
        except NoRoom as error:
            raise ValidationError({"device": str(error)}) from error
        except ReplicaError as error:
            raise ValidationError({"machine": str(error)}) from error
        except (RedisError, OSError) as error:
            raise ValidationError("Redis does not answer, so it is not known which machines there are.") from error
        values["device"] = found.name


@admin.register(WantedReplica)
class WantedReplicaAdmin(AuditedAdmin):
    """Replicas that operators added or steered. An added one whose row is deleted is stopped."""

    form = WantedReplicaForm
    list_display = ["name", "deployment", "machine", "device", "wanted", "status", "generation", "changed_at"]
    list_filter = ["wanted", "machine"]
    list_select_related = ["deployment"]
    search_fields = ["name", "machine"]
    search_help_text = "Name or machine"
    readonly_fields = ["told"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[WantedReplica]:
        heard = Replica.objects.filter(name=OuterRef("name")).values("state")[:1]
        return super().get_queryset(request).annotate(heard=Subquery(heard))  # type: ignore[no-any-return]

    @display(description="last heard as")
    def status(self, row: WantedReplica) -> str:
        return getattr(row, "heard", None) or "not heard of"

    @display(description="told by operators")
    def told(self, row: WantedReplica) -> str:
        return "; ".join(f"{command} {arguments or ''}".strip() for command, arguments in row.commands.values()) or "-"

    def save_model(self, request: HttpRequest, obj: WantedReplica, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        transaction.on_commit(publish_wanted)

    def delete_model(self, request: HttpRequest, obj: WantedReplica) -> None:
        super().delete_model(request, obj)
        transaction.on_commit(publish_wanted)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[WantedReplica]) -> None:
        super().delete_queryset(request, queryset)
        transaction.on_commit(publish_wanted)
