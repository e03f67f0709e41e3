"""What each tenant got: use against its quota now, its SLA over hours and days, its service against its share."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db.models import Sum
from redis.exceptions import RedisError

from dashboard.models import RequestRollup, Resolution
from dashboard.overdue import Late, count_late, read_waits
from dashboard.refusals import read_pairs, read_refusals
from dashboard.selectors.fairness import Service, judge_evenness, read_services
from inference.services import read_replicas
from scheduling.connection import live_keys, live_redis
from scheduling.fleet import FleetQueue
from scheduling.limits import TenantLimits, TenantUsage
from scheduling.models import Tenant
from scheduling.selectors import find_service_levels, find_weights
from scheduling.store import TIME, Command, execute_many

log = logging.getLogger(__name__)

MAX_TENANTS = 200
WINDOWS = {"1h": timedelta(hours=1), "24h": timedelta(hours=24), "30d": timedelta(days=30)}
DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a tenant uses now. Limits that are not set are None, as is what is left of them."""

    running: int = 0
    waiting: int = 0
    slots: int = 0
    concurrency: int | None = None
    rpm: int | None = None
    rpm_used: int | None = None
    tpm: int | None = None
    tpm_used: int | None = None
    tpd: int | None = None
    tpd_used: int | None = None
    """Of the daily budget; without one, what today's requests that ended took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Requests of a window that a service level judged, and how many met it. None where none was judged.

    Judged are requests that ended, those refused for want of capacity, and those that wait past their target now.
    """

    judged: int = 0
    met: int = 0
    allowed: float = 0.0

    @property
    def share(self) -> float | None:
        return self.met / self.judged if self.judged else None

    @property
    def budget_left(self) -> float | None:
        """Of the misses that the objective allows, the share that is left; below 0 it is overdrawn."""
        return 1 - (self.judged - self.met) / self.allowed if self.allowed > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRow:
    """One tenant on the page."""

    name: str
    display_name: str
    weight: float
    suspended: bool
    use: Use | None
    attainment: Mapping[str, Attainment]
    service: Service
    refusals: Mapping[str, int] = field(default_factory=dict)
    """By reason, since the store's counters began."""
    refused: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By window, then by reason, most first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantsView:
    """Tenants by name, and whether the queue's store answered."""

    rows: list[TenantRow]
    next: str
    """The name after which the rest begins; "" where there are no more."""
    jain: float | None
    """Jain's index of service per entitlement over an hour, of all tenants, whatever is shown."""
    live: bool


def read_tenants(models: Sequence[str], now: datetime, *, after: str = "", limit: int = MAX_TENANTS) -> TenantsView:
    """So many tenants, those whose names come after this one, by a few queries and one round trip.

    Shares are among all tenants.
    """
    limit = min(limit, MAX_TENANTS)
    found = list(Tenant.objects.select_related("quota").filter(name__gt=after).order_by("name")[: limit + 1])
    shown = found[:limit]
    late = _read_late(models)
    attained = {name: _attainment(now - span, span, late) for name, span in WINDOWS.items()}
    refused = {name: read_refusals(now - span, _grain(span)) for name, span in WINDOWS.items()}
    try:
        uses, refusals, waiting = _read_live(shown, models, _tokens_today(now))
    except (RedisError, OSError) as error:
        log.warning("Redis does not answer (%s); tenants are shown without what they use now.", error)
        uses, refusals, waiting = {}, {}, {}
    service = read_services(find_weights(), waiting, now - WINDOWS["1h"])
    rows = [
        TenantRow(
            name=tenant.name,
            display_name=tenant.display_name,
            weight=tenant.weight,
            suspended=tenant.suspended,
            use=uses.get(tenant.name),
            attainment={name: of.get(tenant.name, Attainment()) for name, of in attained.items()},
            service=service.get(tenant.name, Service()),
            refusals=refusals.get(tenant.name, {}),
            refused={name: of.get(tenant.name, {}) for name, of in refused.items()},
        )
        for tenant in shown
    ]
    return TenantsView(
        rows=rows,
        next=shown[-1].name if len(found) > limit else "",
        jain=judge_evenness(service.values()),
        live=bool(uses) or not shown,
    )


def _read_late(models: Sequence[str]) -> dict[str, Late]:
    """Of each tenant, what waits past its target at this moment: no sum counts it before its end."""
    found: dict[str, Late] = {}
    try:
        by_model = count_late(read_waits(models), find_service_levels())
    except (RedisError, OSError) as error:
        log.warning("Redis does not answer (%s); service levels are shown without what waits.", error)
        return found
    for (_model, tenant), late in by_model.items():
        sums = found.get(tenant, Late())
        found[tenant] = Late(num=sums.num + late.num, allowed=sums.allowed + late.allowed)
    return found


def _attainment(since: datetime, span: timedelta, late: Mapping[str, Late]) -> dict[str, Attainment]:
    rows = RequestRollup.objects.filter(resolution=_grain(span), start__gte=since).values("tenant")
    found = rows.annotate(num_judged=Sum("judged"), num_met=Sum("met"), sum_allowed=Sum("allowed"))
    sums = {row["tenant"]: (row["num_judged"], row["num_met"], row["sum_allowed"]) for row in found}
    attained = {}
    for tenant in sums.keys() | late.keys():
        judged, met, allowed = sums.get(tenant, (0, 0, 0.0))
        more = late.get(tenant, Late())
        attained[tenant] = Attainment(judged=judged + more.num, met=met, allowed=allowed + more.allowed)
    return attained


def _grain(span: timedelta) -> Resolution:
    return Resolution.MINUTE if span <= timedelta(hours=1) else Resolution.HOUR


def _tokens_today(now: datetime) -> dict[str, int]:
    """Tokens of requests that ended since midnight UTC."""
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    rows = RequestRollup.objects.filter(resolution=Resolution.HOUR, start__gte=midnight).values("tenant")
    sums = rows.annotate(tokens=Sum("prompt_tokens") + Sum("completion_tokens"))
    return {row["tenant"]: row["tokens"] for row in sums}


def _read_live(
    tenants: Sequence[Tenant], models: Sequence[str], tokens_today: Mapping[str, int]
) -> tuple[dict[str, Use], dict[str, dict[str, int]], dict[str, int]]:
    """What these tenants use; of all, refusals by reason and how many requests wait."""
    client, keys = live_redis(), live_keys()
    limits = TenantLimits(keys)
    queues = [FleetQueue(keys, model) for model in models]
    fixed: list[Command[Any]] = [TIME, Command(("HGETALL", keys.refusals), read_pairs)]
    answers = execute_many(
        client,
        [
            *fixed,
            *(queue.snapshot() for queue in queues),
            *(limits.usage(tenant.name) for tenant in tenants),
            *(Command(("HMGET", f"{keys.tenant(tenant.name)}:day", "day", "tokens"), _read_day) for tenant in tenants),
        ],
    )
    now_s, counters, rest = answers[0], answers[1], answers[2:]
    snapshots, rest = rest[: len(queues)], rest[len(queues) :]
    usages, days = rest[: len(tenants)], rest[len(tenants) :]
    waiting: dict[str, int] = defaultdict(int)
    for snapshot in snapshots:
        for name, num in snapshot.by_tenant.items():
            waiting[name] += num
    running: dict[str, int] = defaultdict(int)
    for status in read_replicas(client, keys):
        for slot in status.slots:
            running[slot.tenant] += 1
    uses = {
        tenant.name: _use(
            tenant,
            usage,
            tokens_today.get(tenant.name, 0) if _budget(tenant) is None else day[1] if day[0] == now_s // DAY_S else 0,
            running[tenant.name],
            waiting[tenant.name],
        )
        for tenant, usage, day in zip(tenants, usages, days, strict=True)
    }
    return uses, _refusals(counters), waiting


def _budget(tenant: Tenant) -> int | None:
    return getattr(getattr(tenant, "quota", None), "tpd", None)


def _use(tenant: Tenant, usage: TenantUsage, today: int, running: int, waiting: int) -> Use:
    quota = getattr(tenant, "quota", None)
    rpm, tpm = (getattr(quota, name, None) for name in ("rpm", "tpm"))
    return Use(
        running=running,
        waiting=waiting,
        slots=usage.running,
        concurrency=getattr(quota, "concurrency", None),
        rpm=rpm,
        rpm_used=_used(rpm, usage.remaining_requests),
        tpm=tpm,
        tpm_used=_used(tpm, usage.remaining_tokens),
        tpd=_budget(tenant),
        tpd_used=today,
    )


def _used(limit: int | None, left: int | None) -> int | None:
    """What is gone of a bucket; a bucket that nobody used lately is full."""
    return None if limit is None else 0 if left is None else max(0, limit - left)


def _read_day(reply: Sequence[bytes | None]) -> tuple[int, int]:
    day, tokens = reply
    return int(float(day or -1)), int(float(tokens or 0))


def _refusals(counters: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Tenant -> reason -> how many, over all models."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, num in counters.items():
        _model, tenant, reason = name.rsplit("|", 2)
        found[tenant][reason] += num
    return {tenant: dict(sorted(reasons.items())) for tenant, reasons in found.items()}
