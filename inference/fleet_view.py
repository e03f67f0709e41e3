"""Wanted beside actual: what every deployment and replica should be, what it is, and what differs, in sentences."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inference.messages import DeploymentSpec, ReplicaStatus
from inference.plan import SILENT_S, Machine, Plan, PlannedReplica, RunningReplica, pod_of, settings_digest

GATES = {"pause": "paused", "resume": "ready", "drain": "stopped"}
"""The state that the last command to a replica leads to."""
SERVING = ("ready", "paused", "draining")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """A replica that is wanted, or runs."""

    name: str
    model: str
    machine: str
    """Empty: no supervisor runs it."""
    device: str
    device_label: str
    own: bool
    """Whether its machine's settings ask for it."""
    wanted: bool
    running: bool
    """Whether it serves, or would if it were not paused."""
    state: str
    """What it says of itself, or else its machine of it: `starting`, `stopping`, `waiting`, `stopped`, `missing`."""
    differs: str
    """What it is not yet, in a sentence; empty where it is as wanted."""
    since_s: float
    """Since when it is so, as unix time; 0 where that is unknown."""
    until_s: float | None
    """When the wait ends: the next start, or the end of a drain."""
    settings: str
    """`taken up`, `pending`, or empty where it does not say."""
    notes: str
    """What operators told it in place of its deployment's settings."""
    can_stop: bool
    """Whether a supervisor obeys the plan here."""
    can_restart: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentView:
    """A model's replicas."""

    model: str
    wanted: int
    running: int
    differs: str
    """`wanted: 2 replicas, running: 1`, with what the difference is; empty where nothing differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """All of it, ordered by name."""

    revision: int
    deployments: list[DeploymentView] = field(default_factory=list)
    replicas: list[ReplicaView] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """All that is known of one replica, and of what it should be."""

    name: str
    planned: PlannedReplica | None
    machine: Machine | None
    process: RunningReplica | None
    status: ReplicaStatus | None
    specs: Mapping[str, DeploymentSpec]
    now_s: float
    is_to_come: bool
    """Whether an orchestrator that runs machines of this kind could start its machine."""

    @property
    def is_orchestrated(self) -> bool:
        return self.machine is not None and self.machine.orchestrated

    @property
    def is_silent(self) -> bool:
        """Whether its machine is."""
        return self.machine is not None and self.now_s - self.machine.time_s > SILENT_S

    @property
    def is_wanted(self) -> bool:
        return self.planned is None or self.planned.wanted == "running"

    @property
    def where(self) -> str:
        return f" on {self.machine.name}" if self.machine else ""

    @property
    def asked_s(self) -> float:
        return self.planned.since_s if self.planned else 0.0

    @property
    def model(self) -> str:
        if self.status is not None:
            return self.status.model
        named = (self.process.model if self.process else "") or (self.planned.model if self.planned else "")
        newest = max(self.specs.values(), key=lambda spec: (spec.created_s, spec.name), default=None)
        return named or (newest.name if newest and self.process else "")

    @property
    def state(self) -> str:
        if self.process is not None and self.process.state in ("waiting", "stopped"):
            return self.process.state
        if self.status is not None:
            return self.status.state
        if self.process is None:
            return "missing"
        return "stopping" if self.process.state == "stopping" else "starting"

    @property
    def settings(self) -> str:
        spec = self.specs.get(self.status.model) if self.status else None
        if self.status is None or spec is None or not self.status.settings:
            return ""
        return "taken up" if self.status.settings == settings_digest(spec) else "pending"

    @property
    def device(self) -> str:
        return self.process.device if self.process else self.planned.device if self.planned else ""


def view_fleet(
    plan: Plan,
    machines: Mapping[str, Machine],
    statuses: Iterable[ReplicaStatus],
    specs: Mapping[str, DeploymentSpec],
    *,
    now_s: float,
) -> FleetView:
    """What is wanted beside what is. `statuses` are those of replicas that report now, `specs` the deployments."""
    reporting = {status.replica: status for status in statuses}
    placed = {replica.name: (machine, replica) for machine in machines.values() for replica in machine.replicas}
    names = {*placed, *reporting, *(planned.name for planned in plan.replicas.values() if planned.model)}
    pods = {pod_of(machine.name) for machine in machines.values() if machine.orchestrated}
    replicas = []
    for name in sorted(names, key=_natural):
        planned, (machine, process) = plan.replicas.get(name), placed.get(name, (None, None))
        facts = _Facts(
            name=name, planned=planned, process=process, status=reporting.get(name), specs=specs,
            now_s=now_s, machine=machine or (machines.get(planned.machine) if planned else None),
            is_to_come=planned is not None and pod_of(planned.machine) in pods,
        )  # fmt: skip
        if facts.is_wanted or facts.process or facts.status:
            replicas.append(_view_replica(facts))
    models = sorted({*specs, *(replica.model for replica in replicas if replica.model)})
    return FleetView(
        revision=plan.revision,
        deployments=[_view_deployment(model, replicas) for model in models],
        replicas=replicas,
        machines=sorted(machines.values(), key=lambda machine: _natural(machine.name)),
    )


def _view_deployment(model: str, replicas: Iterable[ReplicaView]) -> DeploymentView:
    mine = [replica for replica in replicas if replica.model == model]
    num_wanted, num_running = sum(r.wanted for r in mine), sum(r.running for r in mine)
    details = "; ".join(replica.differs.rstrip(".") for replica in mine if replica.differs)
    counts = f"wanted: {num_wanted} {'replica' if num_wanted == 1 else 'replicas'}, running: {num_running}"
    differs = f"{counts}; {details}." if details else f"{counts}." if num_wanted != num_running else ""
    return DeploymentView(model=model, wanted=num_wanted, running=num_running, differs=differs)


def _view_replica(facts: _Facts) -> ReplicaView:
    planned, machine, process, status = facts.planned, facts.machine, facts.process, facts.status
    differs, since_s = _difference(facts)
    obeys = machine is not None and not facts.is_silent
    return ReplicaView(
        name=facts.name,
        model=facts.model,
        machine=machine.name if machine else planned.machine if planned else "",
        device=facts.device,
        device_label=_label(machine, facts.device),
        own=process.own if process else False,
        wanted=facts.is_wanted,
        running=status is not None and status.state in SERVING,
        state=facts.state,
        differs=differs,
        since_s=since_s,
        until_s=process.until_s if process else None,
        settings=facts.settings,
        notes=_notes(planned),
        can_stop=obeys or (planned is not None and bool(planned.model)),
        can_restart=obeys or (planned is not None and bool(planned.model)),
    )


def _difference(facts: _Facts) -> tuple[str, float]:
    """A sentence and since when it is true; empty where all is as wanted."""
    name, where, process, planned = facts.name, facts.where, facts.process, facts.planned
    if planned is not None and planned.wanted == "stopped" and facts.is_orchestrated:
        return f"{name} was removed, and runs until the orchestrator of{where[3:]} scales down.", facts.asked_s
    if facts.is_silent and facts.status is None and facts.machine is not None:
        return f"{name} should run{where}, which is silent.", facts.machine.time_s
    if process is None:
        if facts.status is not None:
            return _describe_running(facts)
        return (_describe_missing(facts), facts.asked_s) if facts.is_wanted else ("", 0.0)
    if process.state == "stopping":
        doing = "drains to be restarted" if facts.is_wanted else "drains before it is removed"
        return f"{name} {doing}{where}.", process.since_s
    if process.state == "waiting":
        return f"{name} does not stay up{where}: {process.detail}", process.since_s
    if process.state == "stopped":
        return "", 0.0
    if planned is not None and process.generation < planned.generation:
        return f"{name} is about to be restarted{where}.", facts.asked_s
    if not facts.is_wanted:
        return f"{name} is about to be removed{where}.", facts.asked_s
    return _describe_running(facts)


def _describe_missing(facts: _Facts) -> str:
    """Of one that is wanted and neither runs nor is about to be started."""
    name, machine, planned = facts.name, facts.machine, facts.planned
    if facts.is_to_come:
        return f"{name} is wanted, and its orchestrator has to start it: scale up."
    if machine is None:
        return f"{name} should run on {planned.machine if planned else 'a machine'}, which has not been heard of."
    if machine.detail:
        return f"{name} should run on {machine.name}: {machine.detail}"
    return f"{name} is about to be started on {machine.name}."


def _describe_running(facts: _Facts) -> tuple[str, float]:
    name, status, planned = facts.name, facts.status, facts.planned
    if status is None or status.state == "starting":
        since_s = facts.process.since_s if facts.process else status.started_s if status else 0.0
        return f"starting {name}{facts.where}.", since_s
    if status.state in ("failed", "unhealthy"):
        return f"{name} cannot serve: {status.detail}", status.started_s
    gate = GATES.get(planned.commands["gate"][0]) if planned and "gate" in planned.commands else None
    if gate and status.state != gate and (gate, status.state) != ("stopped", "draining"):
        return f"{name} should be {gate}, and is {status.state}.", facts.asked_s
    if facts.settings == "pending":
        return f"{name} has not taken up its deployment's settings yet.", 0.0
    return "", 0.0


def _notes(planned: PlannedReplica | None) -> str:
    """Such as `mode static, batch size 4`."""
    told = dict(planned.commands) if planned else {}
    told.pop("gate", None)
    return ", ".join(f"{kind} {_shown(arguments)}" for kind, (_, arguments) in sorted(told.items()))


def _shown(arguments: Mapping[str, Any]) -> str:
    values = [str(value) for value in arguments.values() if not isinstance(value, Mapping)]
    inner = [f"{k} {v:g}" for value in arguments.values() if isinstance(value, Mapping) for k, v in value.items()]
    return " ".join(values) + (f" ({', '.join(inner)})" if inner else "")


def _label(machine: Machine | None, device: str) -> str:
    found = next((d.label for d in machine.devices if d.name == device), "") if machine else ""
    return found or device


def _natural(name: str) -> tuple[str, int, str]:
    """gpu-2 before gpu-10."""
    head = name.rstrip("0123456789")
    return (head, int(name[len(head) :] or -1), name)
