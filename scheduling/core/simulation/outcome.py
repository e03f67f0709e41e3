"""What became of each request of a simulation, and the targets it is held to."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from scheduling.core.adaptation import PolicyChange
from scheduling.core.request import QueueEntry
from scheduling.core.simulation.trace import TraceRequest

OutcomeState = Literal["waiting", "running", "finished", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTarget:
    """Targets of an SLA, in seconds; None where it sets none."""

    ttft_s: float | None = None
    """Arrival to first token."""
    e2e_s: float | None = None
    """Arrival to last token."""
    tpot_s: float | None = None
    """Between two output tokens, on average over a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTargets:
    """The targets of all requests: by tenant and priority where set, else by priority, else the default."""

    default: ServiceTarget = ServiceTarget(ttft_s=5.0)
    by_priority: Mapping[int, ServiceTarget] = field(default_factory=dict)
    by_tenant: Mapping[tuple[str, int], ServiceTarget] = field(default_factory=dict)

    def of(self, request: TraceRequest | QueueEntry) -> ServiceTarget:
        own = self.by_tenant.get((request.tenant, request.priority))
        return own or self.by_priority.get(request.priority, self.default)


@dataclass(slots=True, eq=False)
class Outcome:
    """A request, and when what happened to it, in seconds of virtual time."""

    request: TraceRequest
    state: OutcomeState = "waiting"
    reason: str = ""
    """Why it was refused."""
    replica: int = -1
    claimed_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.request.arrival_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """None for a single token too: nothing lies between."""
        if self.finished_s is None or self.first_token_s is None or self.request.output_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.request.output_tokens - 1)

    @property
    def wait_s(self) -> float | None:
        """Arrival to claim."""
        return None if self.claimed_s is None else self.claimed_s - self.request.arrival_s

    def meets(self, target: ServiceTarget) -> bool:
        """Whether it was answered within all that the target sets."""
        if self.state != "finished":
            return False
        measured = ((self.ttft_s, target.ttft_s), (self.e2e_s, target.e2e_s), (self.tpot_s, target.tpot_s))
        return all(limit is None or value is None or value <= limit for value, limit in measured)


class SizeChange(NamedTuple):
    """A decision of a sizing controller that changed a replica's batch size."""

    time_s: float
    replica: int
    batch_size: int
    reason: str


@dataclass(slots=True, kw_only=True)
class SimulationResult:
    """All that a simulation gave."""

    outcomes: list[Outcome]
    end_s: float
    """Virtual time from the trace's start to the last event."""
    steps: int
    busy_s: float
    """Seconds of forward passes, over all replicas."""
    preemptions: int
    batch_sizes: Counter[int]
    """Steps by the number of sequences in them."""
    size_changes: list[SizeChange]
    num_replicas: int
    policy_changes: list[PolicyChange] = field(default_factory=list)
