"""What alert rules are judged by: figures of one moment, without a clock, a database or Redis behind them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueNow:
    """A model's queue at this moment."""

    depth: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaNow:
    """What is known of a replica. `silent_s`: since it last told of its device, or anything at all."""

    model: str
    state: str
    silent_s: float
    why_silent: str = ""
    throttle_reasons: tuple[str, ...] = ()
    kv_usage: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What Redis says now, of the models that are offered."""

    queues: Mapping[str, QueueNow] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaNow] = field(default_factory=dict)

    def num_ready(self, model: str) -> int:
        """Workers of a model that take requests."""
        return sum(replica.model == model and replica.state == "ready" for replica in self.replicas.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSums:
    """What a replica computed within a window. `slot_steps`: steps times slots; the others as in BatchRollup."""

    seconds: int
    steps: int
    sequence_steps: float
    slot_steps: float
    step_ms: float
    throttled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSums:
    """Requests of a tenant on a model that ended, or were refused for want of capacity, within a window.

    `judged` are those with a service level, the refused and the overdue too; `allowed`: misses that objectives allow.
    """

    finished: int = 0
    failed: int = 0
    refused: int = 0
    judged: int = 0
    met: int = 0
    allowed: float = 0.0


BatchWindow = Mapping[tuple[str, str], BatchSums]
"""By model and replica."""
RequestWindow = Mapping[tuple[str, str], RequestSums]
"""By model and tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Everything that one evaluation reads. `live` is None while Redis is away; windows are by their seconds."""

    live: Live | None = None
    batches: Mapping[int, BatchWindow] = field(default_factory=dict)
    requests: Mapping[int, RequestWindow] = field(default_factory=dict)
