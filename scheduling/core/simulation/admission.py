"""Admission in a simulation: tenants' limits, the level of backpressure, and the bounds of the queue."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduling.core.answers import QueueSnapshot
from scheduling.core.backpressure import CALM, BackpressureLimits, assess, depth_limit, settle
from scheduling.core.drain import BacklogRate
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
        self._backlog = BacklogRate()
        self._standing = CALM
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

    def assess(self, now_s: float, snapshot: QueueSnapshot, kv_usage: float) -> None:
        """Find the level as web processes do: from the queue's depth, its drain, and KV use; with hysteresis."""
        settings = self.settings
        assert settings is not None
        assert settings.queue_limit is not None
        limit = settings.queue_limit
        self._backlog.observe(snapshot, now_s)
        wait_s = self._backlog.wait_s(snapshot.waiting_tokens)
        rises, stays = (
            assess(limits, depth=snapshot.depth, queue_limit=limit, wait_s=wait_s, kv_usage=kv_usage)
            for limits in (settings.limits, settings.limits.lowered())
        )
        self._standing = settle(self._standing, rises=rises, stays=stays, hold_s=settings.limits.hold_s, now_s=now_s)

    def _bounds(self, priority: int) -> Bounds:
        settings = self.settings
        if settings is None:
            return NO_BOUNDS
        limit = NO_LIMIT
        if settings.queue_limit is not None:
            limit = depth_limit(priority, settings.queue_limit, self._standing.assessment.level, settings.limits)
        return Bounds(limit, settings.tokens_limit, settings.shed)
