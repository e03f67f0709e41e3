"""Admission in a simulation: tenants' limits, the level of backpressure, and the bounds of the queue."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduling.core.backpressure import BackpressureLimits, DrainRate, Level, assess, depth_limit
from scheduling.core.request import QueueEntry
from scheduling.core.simulation.limits import TenantLedger, TenantLimit

NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionSettings:
    """What the web processes let in."""

    queue_limit: int | None = 10_000
    """Bound on the requests that wait, and what backpressure is measured by; None sets none."""
    limits: BackpressureLimits = field(default_factory=BackpressureLimits)
    period_s: float = 0.25
    tokens_limit: int | None = None
    """Bound on the tokens that wait; None sets none."""
    shed: bool = True
    """Whether a full queue drops requests of lower priority for one of higher."""
    tenants: Mapping[str, TenantLimit] = field(default_factory=dict)
    start_s: float = 0.0
    """Unix time of the trace's second 0: daily budgets begin at midnight UTC."""


class Bounds(NamedTuple):
    """What an enqueue is held to."""

    depth_limit: int
    tokens_limit: int | None
    shed: bool


NO_BOUNDS = Bounds(NO_LIMIT, None, False)


class SimulatedAdmission:
    """Goes the way of the gateway: the level, the tenant's limits, the queue's bounds. Without settings admits all."""

    def __init__(self, settings: AdmissionSettings | None) -> None:
        self.settings = settings
        self._drain = DrainRate()
        self._level = Level.NONE
        self._ledger = TenantLedger(settings.tenants, start_s=settings.start_s) if settings else None

    @property
    def is_assessed(self) -> bool:
        """Whether there is a level to assess."""
        return self.settings is not None and self.settings.queue_limit is not None

    def admit(self, entry: QueueEntry, now_s: float) -> Bounds | str:
        """What the enqueue is held to, the tenant being charged; or the reason for a refusal, with nothing charged."""
        bounds = self._bounds(entry.priority)
        if bounds.depth_limit <= 0:
            return "overloaded"
        if self._ledger is not None:
            return self._ledger.acquire(entry.tenant, entry.id, entry.cost_tokens, now_s) or bounds
        return bounds

    def refuse_full(self, entry: QueueEntry, now_s: float) -> None:
        """The queue had no place: give everything back."""
        if self._ledger is not None:
            self._ledger.settle(entry.tenant, entry.id, entry.cost_tokens, now_s, requests=1)

    def settle(self, tenant: str, request_id: str, unused_tokens: int, now_s: float) -> None:
        """A request that was let in has ended."""
        if self._ledger is not None:
            self._ledger.settle(tenant, request_id, unused_tokens, now_s)

    def assess(
        self, now_s: float, *, claimed: int, claimed_tokens: int, depth: int, waiting_tokens: int, kv_usage: float
    ) -> None:
        """Look at what was claimed in all, at what waits, and at KV use."""
        assert self.settings is not None
        assert self.settings.queue_limit is not None
        self._drain.update(now_s, claimed, claimed_tokens)
        self._level = assess(
            self.settings.limits,
            depth=depth,
            queue_limit=self.settings.queue_limit,
            wait_s=self._drain.wait_s(waiting_tokens),
            kv_usage=kv_usage,
        ).level

    def _bounds(self, priority: int) -> Bounds:
        settings = self.settings
        if settings is None:
            return NO_BOUNDS
        limit = NO_LIMIT
        if settings.queue_limit is not None:
            limit = depth_limit(priority, settings.queue_limit, self._level, settings.limits)
        return Bounds(limit, settings.tokens_limit, settings.shed)
