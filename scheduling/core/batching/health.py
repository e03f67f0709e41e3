"""What an in-process batcher tells of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherHealth:
    """How a batcher does. Means are over all batches so far."""

    batches: int
    finished: int
    failed: int
    """Requests whose future got an exception."""
    depth: int
    """Requests waiting."""
    running: int
    """Requests in a batch right now."""
    mean_size: float
    mean_duration_s: float
    batch_size: int
    """The most that the next batch may hold."""
    triggers: dict[str, int]
    """What started the batches, by trigger."""
    latest_reason: str
    policy: str
    """By which requests go next; under `adaptive` the one that it has chosen, and why."""
    policy_reason: str
