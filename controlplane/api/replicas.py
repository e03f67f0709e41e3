"""Replicas as operators want them beside what runs: to read, and to add, remove and restart them."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from ninja import Field, Router, Schema, Status
from redis.exceptions import RedisError

from controlplane.api.access import ControlAuth, ViewerAuth
from controlplane.api.schemas import STORABLE
from inference.fleet import read_fleet
from inference.fleet_view import FleetView
from inference.gateway.errors import InvalidRequest, ModelNotFound, NotFound, RedisUnavailable
from inference.models import ModelDeployment, WantedReplica
from inference.plan import SILENT_S
from inference.replicas import ReplicaError, add_replica, find_machine, read_machines, remove_replica, restart_replica
from inference.room import NoRoom
from inference.services import read_replicas
from inference.wanted import MAX_DRAIN_S
from scheduling.connection import live_keys, live_redis

router = Router(tags=["fleet"])
P = ParamSpec("P")
R = TypeVar("R")


class DeploymentView(Schema):
    """A model's replicas, wanted and running."""

    model: str
    wanted: int
    running: int
    differs: str = Field(description="What is not as wanted, in a sentence; empty where nothing differs.")


class WantedReplicaView(Schema):
    """A replica that is wanted, or runs."""

    name: str
    model: str
    machine: str = Field(description="Empty: no supervisor runs it; it was started by hand.")
    device: str
    device_label: str
    own: bool = Field(description="Whether its machine's settings ask for it.")
    wanted: bool
    running: bool
    state: str
    differs: str = Field(description="What it is not as wanted, in a sentence; empty where it is.")
    since_s: float = Field(description="Unix time since when that is so; 0 where that is unknown.")
    until_s: float | None = Field(description="Unix time of the next start, or of the end of a drain.")
    settings: str = Field(
        description="Its deployment's settings: `taken up`, `pending`, or empty where it does not say."
    )
    notes: str = Field(description="What operators told it in place of its deployment's settings.")


class DeviceView(Schema):
    """Where a replica can be placed."""

    name: str
    label: str
    memory_total_bytes: int
    memory_free_bytes: int


class MachineView(Schema):
    """A supervisor that runs gpu workers."""

    name: str
    host: str
    silent: bool
    heard_s_ago: float
    orchestrated: bool = Field(description="An orchestrator decides how many replicas it runs.")
    revision: int = Field(description="Of the plan that it has taken up.")
    devices: list[DeviceView]
    replicas: list[str]


class FleetAnswer(Schema):
    """The fleet as it is wanted and as it is."""

    revision: int = Field(description="Of the plan; machines name the one that they have taken up.")
    deployments: list[DeploymentView]
    replicas: list[WantedReplicaView]
    machines: list[MachineView]


class AddBody(Schema, extra="forbid"):
    """A replica to add."""

    model: str = Field(max_length=128, pattern=STORABLE)
    machine: str = Field(max_length=128, pattern=STORABLE, description="One of `machines`.")
    device: str = Field("auto", max_length=110, pattern=STORABLE, description="One of the machine's devices, or auto.")
    name: str = Field("", max_length=64, pattern=r"^[A-Za-z0-9_-]*$", description="Empty: the next free one.")
    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE, description="Why; kept in the audit trail.")


class RemoveBody(Schema, extra="forbid"):
    """A replica to remove."""

    drain_s: float | None = Field(
        default=None, ge=0, le=MAX_DRAIN_S,
        description="How long what runs may finish; then it goes back to the queue. Null: as its machine has it.",
    )  # fmt: skip
    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE, description="Why; kept in the audit trail.")


class RestartBody(Schema, extra="forbid"):
    """A replica to restart."""

    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE, description="Why; kept in the audit trail.")


class WishView(Schema):
    """What is wanted from now on; the machine follows, see `/fleet`."""

    name: str
    model: str = Field(description="Empty: its machine's settings say which.")
    machine: str
    device: str
    wanted: str
    generation: int


def translated(call: Callable[P, R]) -> Callable[P, R]:
    """Errors of the fleet as the API's."""

    @wraps(call)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except (RedisError, OSError) as error:
            raise RedisUnavailable("Redis does not answer, so the fleet is not known.") from error
        except NoRoom as error:
            raise InvalidRequest(str(error), param="device", code="no_room") from error
        except ReplicaError as error:
            if error.missing:
                raise NotFound(str(error), code="replica_not_found") from error
            raise InvalidRequest(str(error), param=error.field or None) from error
        except ValidationError as error:
            field, problems = next(iter(error.message_dict.items()))
            raise InvalidRequest(problems[0], param=field) from error

    return guarded


@router.get("/fleet", response=FleetAnswer, auth=ViewerAuth(), summary="The fleet as wanted and as it is")
@translated
def show_fleet(request: HttpRequest) -> FleetAnswer:
    """Deployments, replicas and machines, and what differs from what operators want, in sentences."""
    return _answer(read_fleet(live_redis(), live_keys()))


@router.post("/fleet/replicas", response={201: WishView}, auth=ControlAuth(), summary="Add a replica")
@translated
def add_one(request: HttpRequest, body: AddBody) -> Status[WishView]:
    """For operators. The machine starts it within seconds; one that has no memory for it is refused (`no_room`)."""
    client, keys = live_redis(), live_keys()
    deployment = ModelDeployment.objects.filter(name=body.model).first()
    if deployment is None:
        raise ModelNotFound(f"There is no model {body.model[:128]!r}.", param="model")
    row = add_replica(
        deployment=deployment,
        machine=find_machine(read_machines(client, keys), body.machine),
        device=body.device,
        name=body.name,
        statuses=read_replicas(client, keys),
        actor=_actor(request),
        reason=body.reason,
    )
    return Status(201, _wish(row))


@router.post("/fleet/replicas/{name}/remove", response=WishView, auth=ControlAuth(), summary="Remove a replica")
@translated
def remove_one(request: HttpRequest, name: str, body: RemoveBody) -> WishView:
    """For operators. It claims no more, finishes what runs for `drain_s`, gives the rest back, and ends."""
    machines = read_machines(live_redis(), live_keys())
    row = remove_replica(name=name, machines=machines, drain_s=body.drain_s, actor=_actor(request), reason=body.reason)
    return _wish(row)


@router.post("/fleet/replicas/{name}/restart", response=WishView, auth=ControlAuth(), summary="Restart a replica")
@translated
def restart_one(request: HttpRequest, name: str, body: RestartBody) -> WishView:
    """For operators. It drains, ends, and starts anew with what operators told it; one that was removed starts too."""
    machines = read_machines(live_redis(), live_keys())
    return _wish(restart_replica(name=name, machines=machines, actor=_actor(request), reason=body.reason))


def _actor(request: HttpRequest) -> User:
    user: Any = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    return user


def _wish(row: WantedReplica) -> WishView:
    return WishView(
        name=row.name,
        model=row.deployment.name if row.deployment else "",
        machine=row.machine,
        device=row.device,
        wanted=row.wanted,
        generation=row.generation,
    )


def _answer(view: FleetView) -> FleetAnswer:
    now_s = time.time()
    return FleetAnswer(
        revision=view.revision,
        deployments=[DeploymentView.from_orm(deployment) for deployment in view.deployments],
        replicas=[WantedReplicaView.from_orm(replica) for replica in view.replicas],
        machines=[
            MachineView(
                name=machine.name,
                host=machine.host,
                silent=now_s - machine.time_s > SILENT_S,
                heard_s_ago=max(0.0, now_s - machine.time_s),
                orchestrated=machine.orchestrated,
                revision=machine.revision,
                devices=[DeviceView.from_orm(device) for device in machine.devices],
                replicas=[replica.name for replica in machine.replicas],
            )
            for machine in view.machines
        ],
    )
