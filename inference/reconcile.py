"""What a machine does about the plan: from what is wanted and what runs to what it starts and stops. Pure functions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from inference.plan import Plan, RunningReplica

BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Pauses before a process that did not live long is started again; the last one stays."""
STABLE_S = 30.0
"""A process that lived for so long ended by an accident of its own, and is started again at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A replica that the machine should run. `model` empty: the newest deployment."""

    name: str
    model: str = ""
    device: str = "auto"
    generation: int = 0
    own: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Start a replica that does not run."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Stop:
    """Let a replica drain and end; None is the machine's own limit. One that drains already is told so to give up."""

    name: str
    drain_s: float | None


@dataclass(frozen=True, slots=True)
class Forget:
    """A replica that ended is wanted no more."""

    name: str


Action = Start | Stop | Forget


def wanted_here(plan: Plan, *, machine: str, own: Iterable[Wanted], orchestrated: bool) -> dict[str, Wanted]:
    """By name, the replicas that a machine should run: those of its settings, and what the plan says.

    Where an orchestrator decides how many there are, the plan restarts, and neither adds nor removes.
    """
    wanted: dict[str, Wanted] = {}
    for mine in own:
        planned = plan.replicas.get(mine.name)
        if planned is None or planned.wanted == "running" or orchestrated:
            generation = planned.generation if planned else 0
            wanted[mine.name] = Wanted(
                name=mine.name, model=mine.model, device=mine.device, generation=generation, own=True
            )
    if orchestrated:
        return wanted
    for planned in plan.replicas.values():
        if planned.machine == machine and planned.model and planned.wanted == "running":
            wanted.setdefault(
                planned.name,
                Wanted(name=planned.name, model=planned.model, device=planned.device, generation=planned.generation),
            )
    return wanted


def reconcile(
    wanted: Mapping[str, Wanted], running: Mapping[str, RunningReplica], plan: Plan, *, now_s: float
) -> list[Action]:
    """What to do next. Idempotent: done twice, the second time has nothing to do; called again until nothing is left.

    A replica that is wanted in another way (another generation, model or device) is stopped, and started when it ended.
    """
    actions: list[Action] = []
    for name, replica in running.items():
        wish, limit_s = wanted.get(name), _drain_s(plan, name)
        matches = wish is not None and _is_as_wanted(replica, wish)
        if replica.state == "running" and not matches:
            actions.append(Stop(name, limit_s))
        elif replica.state == "stopping" and limit_s == 0 and replica.drain_s != 0:
            actions.append(Stop(name, 0.0))
        elif replica.state == "waiting" and wish is None:
            actions.append(Forget(name))
        elif replica.state == "waiting" and wish and (not matches or now_s >= (replica.until_s or 0.0)):
            actions.append(Start(wish))  # what an operator asks for since it failed need not wait for the next try
    return actions + [Start(wish) for name, wish in wanted.items() if name not in running]


def pause_s(num_failures: int) -> float:
    """How long a process that failed so many times in a row waits."""
    return BACKOFF_S[min(num_failures, len(BACKOFF_S)) - 1] if num_failures else 0.0


def _is_as_wanted(replica: RunningReplica, wish: Wanted) -> bool:
    return (replica.generation, replica.model, replica.device) == (wish.generation, wish.model, wish.device)


def _drain_s(plan: Plan, name: str) -> float | None:
    """The limit of a removal; a restart takes the machine's own."""
    planned = plan.replicas.get(name)
    return planned.drain_s if planned and planned.wanted == "stopped" else None
