"""The page of the fleet: what is wanted, what runs and where, and the acts that add, remove and restart replicas."""

from typing import Any

from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, JsonResponse
from redis.exceptions import RedisError

from dashboard.access import CONTROL_REPLICA
from dashboard.page import render_page, viewers_only
from dashboard.replica_form import LARGEST_BATCH, MODES
from dashboard.views.commands import operators_only, refuse
from inference.models import ModelDeployment
from inference.replicas import (
    ReplicaError,
    add_replica,
    find_machine,
    read_machines,
    remove_replica,
    restart_replica,
)
from inference.room import NoRoom
from inference.services import read_replicas
from inference.wanted import MAX_DRAIN_S
from scheduling.connection import live_keys, live_redis
from scheduling.core.sizing.strategies import SIZINGS


@viewers_only
def fleet(request: HttpRequest) -> HttpResponse:
    """The frame and the forms; workers, machines and what differs come by the feed."""
    sizings = [
        {"kind": kind, "fields": [(name, spec, spec.default) for name, spec in kind.parameters.items()]}
        for kind in SIZINGS.values()
    ]
    context = {"modes": MODES, "sizings": sizings, "largest_batch": LARGEST_BATCH, "longest_drain": int(MAX_DRAIN_S)}
    return render_page(request, "dashboard/fleet.html", context, page="fleet")


@operators_only(CONTROL_REPLICA)
def change(request: HttpRequest, *, act: str, replica: str = "") -> JsonResponse:
    """Add a replica, or remove or restart one; what is wrong is said at its field."""
    try:
        match act:
            case "add":
                return _add(request)
            case "remove":
                return _remove(request, replica)
            case "restart":
                return _restart(request, replica)
        return refuse(404, "A replica is added, removed or restarted here.")
    except (RedisError, OSError):
        return refuse(503, "The queue's store does not answer, so it is not known what runs where. Try again.")
    except NoRoom as error:
        return refuse(400, str(error), fields={"place": str(error)})
    except ReplicaError as error:
        fields = {"machine": "place"}.get(error.field, error.field)
        return refuse(404 if error.missing else 400, str(error), fields={fields: str(error)} if fields else {})
    except ValidationError as error:
        problems = {name: found[0] for name, found in error.message_dict.items()}
        return refuse(400, next(iter(problems.values())), fields=problems)


def _add(request: HttpRequest) -> JsonResponse:
    client, keys = live_redis(), live_keys()
    model = request.POST.get("model", "").replace("\0", "")
    deployment = ModelDeployment.objects.filter(name=model).first()
    if deployment is None:
        return refuse(404, f"There is no model {model[:128]}.", fields={"model": "Choose a model."})
    machine, _, device = request.POST.get("place", "").partition("|")
    row = add_replica(
        deployment=deployment,
        machine=find_machine(read_machines(client, keys), machine),
        device=device or "auto",
        name=request.POST.get("name", "").strip(),
        statuses=read_replicas(client, keys),
        **_who(request),
    )
    return JsonResponse({"message": f"{row.name} is wanted on {row.machine}.", "name": row.name})


def _remove(request: HttpRequest, replica: str) -> JsonResponse:
    text = request.POST.get("drain_s", "").strip()
    drain_s = float(text) if text.isdecimal() and len(text) < 6 else None
    if text and (drain_s is None or drain_s > MAX_DRAIN_S):
        sentence = f"The limit must be a whole number of seconds from 0 to {MAX_DRAIN_S:,.0f}, or empty."
        return refuse(400, sentence, fields={"drain_s": sentence})
    machines = read_machines(live_redis(), live_keys())
    remove_replica(name=replica, machines=machines, drain_s=drain_s, **_who(request))
    return JsonResponse({"message": f"{replica} drains, and is then removed."})


def _restart(request: HttpRequest, replica: str) -> JsonResponse:
    row = restart_replica(name=replica, machines=read_machines(live_redis(), live_keys()), **_who(request))
    return JsonResponse({"message": f"{replica} starts anew on {row.machine}."})


def _who(request: HttpRequest) -> dict[str, Any]:
    """Without NUL, which PostgreSQL refuses."""
    return {"actor": request.user, "reason": request.POST.get("reason", "").replace("\0", "").strip()}
