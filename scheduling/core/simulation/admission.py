"""Backpressure in a simulation: the level as web processes find it, and the bounds they pass to an enqueue."""

from dataclasses import dataclass, field
from typing import NamedTuple

from scheduling.core.backpressure import BackpressureLimits, DrainRate, Level, assess, depth_limit

NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionSettings:
    """Backpressure as the web processes apply it."""

    queue_limit: int = 10_000
    limits: BackpressureLimits = field(default_factory=BackpressureLimits)
    period_s: float = 0.25
    tokens_limit: int | None = None
    """Bound on the tokens that wait; None sets none."""
    shed: bool = True
    """Whether a full queue drops requests of lower priority for one of higher."""


class Bounds(NamedTuple):
    """What an enqueue is held to."""

    depth_limit: int
    tokens_limit: int | None
    shed: bool


class SimulatedAdmission:
    """Assesses the queue now and then; without settings, admits everything."""

    def __init__(self, settings: AdmissionSettings | None) -> None:
        self.settings = settings
        self._drain = DrainRate()
        self._level = Level.NONE

    def bounds(self, priority: int) -> Bounds:
        """For a request of this priority, at the level last assessed."""
        settings = self.settings
        if settings is None:
            return Bounds(NO_LIMIT, None, False)
        limit = depth_limit(priority, settings.queue_limit, self._level, settings.limits)
        return Bounds(limit, settings.tokens_limit, settings.shed)

    def assess(
        self, now_s: float, *, claimed: int, claimed_tokens: int, depth: int, waiting_tokens: int, kv_usage: float
    ) -> None:
        """Look at what was claimed in all, at what waits, and at KV use."""
        assert self.settings is not None
        self._drain.update(now_s, claimed, claimed_tokens)
        self._level = assess(
            self.settings.limits,
            depth=depth,
            queue_limit=self.settings.queue_limit,
            wait_s=self._drain.wait_s(waiting_tokens),
            kv_usage=kv_usage,
        ).level
