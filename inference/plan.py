"""What machines and gpu workers are asked to run, and what machines say they run: messages in Redis, without Django."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from inference.messages import DeploymentSpec

REVISION = b":revision"
"""Field of the plan's hash beside the replicas' names, which hold no colon. Without it the plan is lost, not empty."""
MACHINE_KEEP_S = 600.0
"""A machine that fell silent without a good-bye is remembered, with what it ran, for this long."""
SILENT_S = 10.0
"""After this long without a word a machine counts as silent."""


class PlannedReplica(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as an operator wants it."""

    name: str
    model: str = ""
    """Empty: the machine's settings start it, and say which."""
    machine: str = ""
    device: str = "auto"
    wanted: Literal["running", "stopped"] = "running"
    generation: int = 0
    """One that runs with a lower number is restarted."""
    drain_s: float | None = None
    """How long what runs may finish when it is stopped; None: as the machine's settings have it."""
    commands: dict[str, tuple[str, dict[str, Any]]] = {}
    """By kind, what an operator told it last: command and arguments."""
    since_s: float = 0.0
    """Unix time of the last change."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All replicas that operators want, and those that they steered."""

    revision: int = 0
    replicas: dict[str, PlannedReplica] = {}


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device that a machine can place a replica on."""

    name: str
    """`cpu`, or a GPU's UUID; what `WantedReplica.device` takes."""
    label: str
    memory_total_bytes: int
    memory_free_bytes: int


class RunningReplica(msgspec.Struct, frozen=True, kw_only=True):
    """A gpu worker of a machine: its process, or why there is none now."""

    name: str
    model: str = ""
    """Empty: the newest deployment."""
    device: str = "auto"
    own: bool = False
    """Whether the machine's settings ask for it."""
    state: Literal["running", "stopping", "waiting", "stopped"]
    """`waiting`: it ended, and is started again at `until_s`. `stopped`: settings ask for it, an operator does not."""
    generation: int = 0
    pid: int = 0
    since_s: float = 0.0
    until_s: float | None = None
    """Unix time of the next start, or at which one that stops is killed."""
    drain_s: float | None = None
    """How long one that stops may finish what it runs."""
    detail: str = ""
    num_failures: int = 0


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A supervisor (`manage.py up`) that runs gpu workers."""

    name: str
    host: str
    pid: int
    time_s: float
    started_s: float
    revision: int = 0
    """Of the plan that it has taken up."""
    orchestrated: bool = False
    """Somebody else (Kubernetes, compose) decides how many replicas there are; it starts and stops none by the plan."""
    drain_s: float = 0.0
    devices: list[Device] = []
    replicas: list[RunningReplica] = []
    detail: str = ""
    """Why it does not reconcile, where it does not."""


_decode_planned = msgspec.json.Decoder(PlannedReplica).decode


def encode_plan(plan: Plan) -> dict[bytes | str, bytes | str]:
    """Fields of the plan's hash."""
    fields: dict[bytes | str, bytes | str] = {
        name.encode(): msgspec.json.encode(replica) for name, replica in plan.replicas.items()
    }
    return fields | {REVISION: str(plan.revision).encode()}


def decode_plan(fields: Mapping[bytes, bytes]) -> Plan | None:
    """The plan; None where Redis holds none. Raises msgspec.MsgspecError."""
    if REVISION not in fields:
        return None
    replicas = {name.decode(): _decode_planned(packed) for name, packed in fields.items() if name != REVISION}
    return Plan(revision=int(fields[REVISION]), replicas=replicas)


def decode_machines(packed: Iterable[bytes | None]) -> dict[str, Machine]:
    """By name; what cannot be read is of another version, and left out."""
    found: dict[str, Machine] = {}
    for value in packed:
        try:
            if value is not None:
                machine = msgspec.msgpack.decode(value, type=Machine)
                found[machine.name] = machine
        except msgspec.MsgspecError:
            continue
    return found


def pod_of(machine: str) -> str:
    """What an orchestrator's machines share: their names without the numbers at the end."""
    return machine.rstrip("0123456789")


def settings_digest(spec: DeploymentSpec) -> str:
    """Tells whether a replica serves by these settings: equal ones give equal digests."""
    return hashlib.blake2s(msgspec.json.encode(spec), digest_size=6).hexdigest()
