"""Tenants' limits in a simulation: the arithmetic of `lua/acquire.lua` and `lua/settle.lua`, on the same buckets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from scheduling.core.admission import Bucket

DAY_S = 86_400
Refusal = Literal["concurrency", "requests_per_minute", "tokens_per_minute", "tokens_per_day"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimit:
    """What a tenant may use; None is no limit."""

    rpm: int | None = None
    tpm: int | None = None
    tpd: int | None = None
    """Tokens of a day, which begins at midnight UTC."""
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("rpm", "tpm", "tpd", "concurrency"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"The limit {name} must be a whole number, 1 or more, not {value!r}.")


NO_LIMITS = TenantLimit()


@dataclass(slots=True)
class _Usage:
    requests: Bucket | None = None
    tokens: Bucket | None = None
    day: int = -1
    day_tokens: int = 0
    running: dict[str, float] = field(default_factory=dict)
    """Request id -> when it was charged."""


class TenantLedger:
    """Charges tenants and gives back. All charges of a request are taken, or none."""

    def __init__(self, limits: Mapping[str, TenantLimit], *, start_s: float = 0.0) -> None:
        """`limits` by tenant; `start_s` is the unix time of the clock's zero, which says when a day begins."""
        self._limits = limits
        self._start_s = start_s
        self._usage: dict[str, _Usage] = {}

    def acquire(self, tenant: str, request_id: str, tokens: int, now_s: float) -> Refusal | None:
        """Charge a request, `tokens` and a concurrency slot; or nothing, and say which limit refuses."""
        limit, usage = self._limits.get(tenant, NO_LIMITS), self._usage.setdefault(tenant, _Usage())
        requests, budget = _at(usage.requests, limit.rpm, now_s), _at(usage.tokens, limit.tpm, now_s)
        day = self._day(now_s)
        used = usage.day_tokens if usage.day == day else 0
        if limit.concurrency is not None and len(usage.running) >= limit.concurrency:
            return "concurrency"
        if requests is not None and requests.level < 1:
            return "requests_per_minute"
        if budget is not None and budget.level < tokens:
            return "tokens_per_minute"
        if used + tokens > (inf if limit.tpd is None else limit.tpd):
            return "tokens_per_day"
        usage.requests = requests and requests.take(1)
        usage.tokens = budget and budget.take(tokens)
        usage.day, usage.day_tokens = day, used + tokens
        usage.running[request_id] = now_s
        return None

    def settle(self, tenant: str, request_id: str, refund_tokens: int, now_s: float, *, requests: int = 0) -> None:
        """At a request's end: give back its slot and the tokens not used; and the request, where it never waited."""
        usage = self._usage[tenant]
        charged_s = usage.running.pop(request_id)
        if usage.day == self._day(charged_s):
            usage.day_tokens = max(0, usage.day_tokens - refund_tokens)
        if usage.requests is not None and requests:
            usage.requests = usage.requests.at(now_s).give(requests)
        if usage.tokens is not None and refund_tokens > 0:
            usage.tokens = usage.tokens.at(now_s).give(refund_tokens)

    def _day(self, now_s: float) -> int:
        return int((self._start_s + now_s) // DAY_S)


def _at(bucket: Bucket | None, per_minute: int | None, now_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    return Bucket.full(per_minute, now_s) if bucket is None else bucket.at(now_s, per_minute)
