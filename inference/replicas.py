"""Writes to the replicas that are wanted, and their way to the machines: in the database first, then published."""

import logging
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import redis
from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import Q
from redis.exceptions import RedisError

from inference.messages import ReplicaStatus
from inference.models import ModelDeployment, Replica, WantedReplica
from inference.plan import (
    MACHINE_KEEP_S,
    SILENT_S,
    Device,
    Machine,
    Plan,
    decode_machines,
    decode_plan,
    encode_plan,
    pod_of,
)
from inference.room import check_room, estimate_need, find_device, promised_bytes
from inference.wanted import is_replica_name
from scheduling.audit import record_action
from scheduling.connection import live_keys, live_redis
from scheduling.keys import Keys
from scheduling.models import ConfigVersion
from scheduling.services import config_changed

logger = logging.getLogger(__name__)

KINDS: dict[str, str] = {
    "pause": "gate",
    "resume": "gate",
    "drain": "gate",
    "set_mode": "mode",
    "set_batch_size": "batch size",
    "sizing": "batch size",
}
"""What is kept of the commands to a replica: the last one of each kind."""


class ReplicaError(Exception):
    """What is asked for cannot be done; the message says why. `field` names what is wrong, where one field is."""

    def __init__(self, message: str, *, field: str = "", missing: bool = False) -> None:
        super().__init__(message)
        self.field = field
        self.missing = missing
        """Whether what was named is not there."""


def load_plan() -> Plan:
    """What the database wants. Its version is read first: what changes meanwhile carries a later one."""
    revision = ConfigVersion.objects.values_list("version", flat=True).first() or 0
    rows = WantedReplica.objects.select_related("deployment")
    return Plan(revision=revision, replicas={row.name: row.to_plan() for row in rows})


def publish_plan(client: redis.Redis, keys: Keys, plan: Plan) -> bool:
    """Make Redis hold exactly this plan; True where something had to change."""
    wanted = encode_plan(plan)
    published: Any = client.hgetall(keys.plan)
    if published == wanted:
        return False
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(keys.plan)
        for name, packed in wanted.items():
            pipe.hset(keys.plan, name, packed)
        pipe.execute()
    return True


def read_plan(client: redis.Redis, keys: Keys) -> Plan:
    """The published plan; an empty one where Redis has none. Raises RedisError."""
    fields: Any = client.hgetall(keys.plan)
    return decode_plan(fields) or Plan()


def read_machines(client: redis.Redis, keys: Keys) -> dict[str, Machine]:
    """Machines that were heard of within the last minutes, silent ones included. Raises RedisError."""
    names: Any = client.zrangebyscore(keys.machines, time.time() - MACHINE_KEEP_S, "+inf")
    packed: Any = client.mget([keys.machine(name.decode()) for name in names]) if names else []
    return decode_machines(packed)


def find_machine(machines: Mapping[str, Machine], name: str, *, now_s: float | None = None) -> Machine:
    """One that reports. Raises ReplicaError."""
    machine = machines.get(name)
    if machine is None:
        known = ", ".join(sorted(machines)) or "none"
        raise ReplicaError(f"There is no machine {name[:128]}; there is {known}.", field="machine")
    if (time.time() if now_s is None else now_s) - machine.time_s > SILENT_S:
        raise ReplicaError(f"{name} has been silent for a while; look after it first.", field="machine")
    return machine


def add_replica(
    *,
    deployment: ModelDeployment,
    machine: Machine,
    device: str = "auto",
    name: str = "",
    statuses: Iterable[ReplicaStatus] = (),
    actor: User | None = None,
    reason: str = "",
) -> WantedReplica:
    """Want one more replica of a model on a machine; an empty name is chosen. `statuses` are those that run now.

    On a machine of an orchestrator it is one more beside it, which the orchestrator has to start. Raises NoRoom where
    the machine has no memory for it, ReplicaError, or ValidationError for a bad name.
    """
    known = {status.replica: status for status in statuses}
    with transaction.atomic():
        config_changed()  # first: who adds at the same time waits here, and then sees this replica's claim to memory
        if not deployment.enabled:
            raise ReplicaError(f"{deployment.name} is not offered; offer it in the admin first.", field="model")
        plan = load_plan()
        taken = {*plan.replicas, *known, *(replica.name for replica in machine.replicas)}
        if name in taken:
            raise ReplicaError(f"There is a replica {name} already; choose another name.", field="name")
        row = WantedReplica(name=name or _free_name(taken), deployment=deployment, machine=machine.name)
        if machine.orchestrated:  # its orchestrator places it, and names it as its next
            row.name = row.machine = _free_name(taken, pod_of(machine.name))
        else:
            row.device = place_replica(
                deployment=deployment, machine=machine, device=device, plan=plan, statuses=known
            ).name
        row.full_clean()
        row.save()
        after = {"model": deployment.name, "machine": row.machine, "device": row.device}
        record_action(actor=actor, action="replica.add", target=row.name, after=after, reason=reason)
        transaction.on_commit(publish_wanted)
    return row


def place_replica(
    *,
    deployment: ModelDeployment,
    machine: Machine,
    device: str,
    plan: Plan,
    statuses: Mapping[str, ReplicaStatus],
) -> Device:
    """The device of a machine that has memory for a replica. Raises NoRoom or ReplicaError."""
    if machine.orchestrated:
        raise ReplicaError(
            f"An orchestrator decides how many replicas run on {machine.name}; scale its workload instead.",
            field="machine",
        )
    found = find_device(machine, device)
    need = estimate_need(deployment.to_spec(), num_parameters=deployment.num_parameters, device=found)
    needs = {
        row.name: estimate_need(row.to_spec(), num_parameters=row.num_parameters, device=found)
        for row in ModelDeployment.objects.filter(enabled=True)
    }
    promised = promised_bytes(machine, found, plan=plan, statuses=statuses, needs=needs)
    check_room(machine, found, need=need, promised=promised)
    return found


def _free_name(taken: Iterable[str], stem: str = "gpu-") -> str:
    numbers = [int(found[1]) for name in taken if (found := re.fullmatch(rf"{re.escape(stem)}(\d{{1,9}})", name))]
    return f"{stem}{max(numbers, default=-1) + 1}"


def remove_replica(
    *,
    name: str,
    machines: Mapping[str, Machine],
    drain_s: float | None = None,
    actor: User | None = None,
    reason: str = "",
) -> WantedReplica:
    """Want a replica no more: its machine lets it finish for `drain_s` (None: the machine's limit) and stops it.

    One of an orchestrator's runs until that scales down. Raises ReplicaError where no machine can stop it,
    ValidationError for a bad limit.
    """
    with transaction.atomic():
        row = _find_row(name, machines)
        before = {"wanted": row.wanted} if row.pk else {"wanted": "running"}
        row.wanted, row.drain_s = WantedReplica.Wanted.STOPPED, drain_s
        _save(row)
        record_action(
            actor=actor, action="replica.remove", target=name, before=before,
            after={"wanted": row.wanted, "drain_s": drain_s, "machine": row.machine}, reason=reason,
        )  # fmt: skip
    return row


def restart_replica(
    *, name: str, machines: Mapping[str, Machine], actor: User | None = None, reason: str = ""
) -> WantedReplica:
    """Have a replica drain, end, and start again; one that was removed from its machine's settings starts again too.

    Raises ReplicaError where no machine can do that.
    """
    with transaction.atomic():
        row = _find_row(name, machines)
        before = {"wanted": row.wanted, "generation": row.generation}
        row.wanted, row.generation, row.drain_s = WantedReplica.Wanted.RUNNING, row.generation + 1, None
        _save(row)
        after = {"wanted": row.wanted, "generation": row.generation}
        record_action(actor=actor, action="replica.restart", target=name, before=before, after=after, reason=reason)
    return row


@transaction.atomic
def remember_commands(*, names: Iterable[str], command: str, arguments: Mapping[str, Any]) -> None:
    """Keep what an operator tells replicas, so that one is told again that starts anew or did not hear it.

    A worker that was started by hand under a name of another form is not kept.
    """
    for name in names:
        if not is_replica_name(name):
            continue
        row = WantedReplica.objects.select_for_update().filter(name=name).first() or WantedReplica(name=name)
        row.commands = {**row.commands, KINDS[command]: [command, dict(arguments)]}
        _save(row)


def take_back_commands(*, model: str, kinds: Iterable[str]) -> None:
    """A change of a deployment takes back what of the same kinds was told to its replicas."""
    served = Replica.objects.filter(model=model).values("name")
    mine = Q(deployment__name=model) | Q(deployment=None, name__in=served)
    for row in WantedReplica.objects.select_for_update(of=("self",)).filter(mine):
        kept = {kind: told for kind, told in row.commands.items() if kind not in set(kinds)}
        if kept != row.commands:
            row.commands = kept
            row.save()


def forget_removed(machines: Mapping[str, Machine], plan: Plan, *, now_s: float | None = None) -> int:
    """Drop the rows of removed replicas that their machines run no more, or whose machines are gone; how many.

    A machine's own keep theirs: without it the next start would bring them back.
    """
    now_s = time.time() if now_s is None else now_s
    num_forgotten = 0
    for row in WantedReplica.objects.filter(wanted=WantedReplica.Wanted.STOPPED).exclude(deployment=None):
        machine = machines.get(row.machine)
        silent = machine is None or now_s - machine.time_s > SILENT_S
        runs = machine is not None and any(r.name == row.name for r in machine.replicas)
        took_up = machine is not None and machine.revision >= plan.revision
        if silent or (took_up and not runs):
            num_forgotten += WantedReplica.objects.filter(pk=row.pk, wanted=row.wanted).delete()[0]
            Replica.objects.filter(name=row.name).exclude(state="failed").update(state="stopped")
    if num_forgotten:
        with transaction.atomic():
            config_changed()
            transaction.on_commit(publish_wanted)
    return num_forgotten


def publish_wanted() -> bool:
    """Bring the plan in Redis up to date; True where it changed. A periodic task repeats what fails here."""
    try:
        return publish_plan(live_redis(), live_keys(), load_plan())
    except (RedisError, OSError) as error:
        logger.warning("Redis does not answer (%s); machines hear of the change when it is back.", error)
        return False


def _find_row(name: str, machines: Mapping[str, Machine]) -> WantedReplica:
    """The row to change, made anew for a replica that only its machine's settings know. Raises ReplicaError."""
    if not is_replica_name(name):
        raise ReplicaError(f"No machine runs {name[:64]!r}.", missing=True)
    row = WantedReplica.objects.select_for_update().filter(name=name).first()
    runs_on = next((m.name for m in machines.values() if any(r.name == name for r in m.replicas)), "")
    if row is None and not runs_on:
        raise ReplicaError(
            f"No machine runs {name[:64]}; a worker that was started by hand is stopped where it was started.",
            missing=True,
        )
    row = row or WantedReplica(name=name)
    row.machine = row.machine or runs_on
    if not row.machine:
        raise ReplicaError(f"{name} was started by hand; stop or start it where that was done.", missing=True)
    return row


def _save(row: WantedReplica) -> None:
    """Raises ValidationError."""
    row.full_clean()
    row.save()
    config_changed()
    transaction.on_commit(publish_wanted)
