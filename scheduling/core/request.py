"""What the scheduler knows of a request, and the six priority levels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple


class Priority(IntEnum):
    """Six levels; a lower number goes first."""

    CRITICAL = 0
    REALTIME = 1
    HIGH = 2
    NORMAL = 3
    LOW = 4
    BULK = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueEntry:
    """One waiting request, as policies and queues see it. Times are unix seconds."""

    id: str
    tenant: str
    priority: int
    arrival_s: float
    prompt_tokens: int
    max_tokens: int
    deadline_s: float | None = None
    share: float = 1.0
    """The tenant's weight under `fair` when this was admitted."""
    drop_expired: bool = False
    """Waiting past `deadline_s` it is dropped, whatever the policy; an answer would come too late to be of use."""

    @property
    def cost_tokens(self) -> int:
        """What a claim charges before the real output length is known."""
        return self.prompt_tokens + self.max_tokens

    def at_weight(self, weights: Mapping[str, float]) -> "QueueEntry":
        """Itself with the weight that its tenant has by now; with its own where that is not among them."""
        share = weights.get(self.tenant, self.share)
        return self if share == self.share else replace(self, share=share)


class Placement(NamedTuple):
    """Where a policy puts a request: which flow, that flow's weight, the rank within it."""

    flow: str
    weight: float
    rank: float
