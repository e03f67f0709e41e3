"""Reads what rules are judged by: queues and workers from Redis, windows from recorded seconds and from roll-ups."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from django.db.models import Count, F, Q, Sum
from redis.exceptions import RedisError

from dashboard.alerts.kinds import Rule
from dashboard.alerts.readings import (
    BatchSums,
    BatchWindow,
    Live,
    QueueNow,
    Readings,
    ReplicaNow,
    RequestSums,
    RequestWindow,
)
from dashboard.models import RequestRollup, Resolution
from dashboard.overdue import Late, count_late, read_waits
from inference.messages import DeploymentSpec, ReplicaStatus
from inference.models import BatchRecord, Replica
from inference.services import read_replicas
from scheduling.connection import live_keys, live_redis
from scheduling.fleet import FleetQueue
from scheduling.selectors import find_service_levels
from scheduling.store import execute_many

log = logging.getLogger(__name__)

MINUTES_BELOW_S = 3 * 3600
"""Longer windows are read from hours: a few thousand rows in place of a few hundred thousand."""
FORGET_AFTER = timedelta(hours=1)
"""A replica that fell silent without a good-bye and is not heard of again has been taken away."""
POWER_CAP = "power cap"
"""A device at its power limit works as it should."""
BATCH_KINDS = ("occupancy", "step_time", "throttling")
REQUEST_KINDS = ("completion", "refusals", "sla_burn")


def read_all(rules: Iterable[Rule], now: datetime) -> Readings:
    """What these rules need. Raises DatabaseError; a Redis that is away leaves `live` out."""
    rules = list(rules)
    of_batches = {rule.window_s for rule in rules if rule.kind in BATCH_KINDS}
    of_requests = {s for rule in rules if rule.kind in REQUEST_KINDS for s in (rule.window_s, rule.short_window_s) if s}
    live = read_live(now)
    late = _read_late(live) if of_requests else {}
    return Readings(
        live=live,
        batches={window_s: read_batches(window_s, now) for window_s in of_batches},
        requests={window_s: _with_late(read_requests(window_s, now), late) for window_s in of_requests},
    )


def read_live(now: datetime) -> Live | None:
    """Queues of offered models, and replicas that are there or fell silent; None while Redis is away."""
    client, keys = live_redis(), live_keys()
    try:
        offered: Any = client.hgetall(keys.deployments)
        specs = {name.decode(): msgspec.json.decode(value, type=DeploymentSpec) for name, value in offered.items()}
        models = sorted(specs)
        snapshots = execute_many(client, [FleetQueue(keys, model).snapshot() for model in models]) if models else []
        statuses = read_replicas(client, keys)
    except (RedisError, OSError, msgspec.MsgspecError) as error:
        log.warning("Queues and workers cannot be read (%s); alerts about them stand as they are.", error)
        return None
    forwarding = {name for name, spec in specs.items() if spec.is_upstream}
    replicas = {
        status.replica: _replica(status, now.timestamp(), has_device=status.model not in forwarding)
        for status in statuses
    }
    return Live(
        queues={model: QueueNow(depth=at.depth) for model, at in zip(models, snapshots, strict=True)},
        replicas={**_silent(replicas.keys(), now), **replicas},
    )


def _read_late(live: Live | None) -> dict[tuple[str, str], Late]:
    """Requests that wait past their service level, by model and tenant: misses that no minute has counted yet."""
    try:
        return count_late(read_waits(list(live.queues)), find_service_levels()) if live else {}
    except (RedisError, OSError) as error:
        log.warning("What waits cannot be read (%s); only what ended is judged.", error)
        return {}


def _with_late(window: RequestWindow, late: Mapping[tuple[str, str], Late]) -> RequestWindow:
    """A window with what waits too long now as missed; once it has ended, a minute counts it."""
    nothing = RequestSums()
    summed = {}
    for key, more in late.items():
        sums = window.get(key, nothing)
        summed[key] = replace(sums, judged=sums.judged + more.num, allowed=sums.allowed + more.allowed)
    return {**window, **summed}


def _replica(status: ReplicaStatus, now_s: float, *, has_device: bool) -> ReplicaNow:
    """`has_device`: false for one that forwards to another server, and so owes no telemetry."""
    telemetry = status.telemetry
    if telemetry is None and not has_device:
        silent_s, why = 0.0, ""
    elif telemetry is None:
        silent_s, why = max(0.0, now_s - status.started_s), "The worker started and told nothing of its device."
    elif telemetry.lost:
        silent_s = max(telemetry.stale_s, now_s - telemetry.time_s if telemetry.time_s else 0.0)
        why = f"The device was read last and then lost{f': {telemetry.detail}' if telemetry.detail else ''}."
    else:
        silent_s, why = telemetry.stale_s, "The driver answered last."
    usage = status.kv_blocks_used / status.kv_blocks_total if status.kv_blocks_total else None
    reasons = tuple(telemetry.throttle_reasons) if telemetry else ()
    return ReplicaNow(
        model=status.model,
        state=status.state,
        silent_s=silent_s,
        why_silent=why,
        throttle_reasons=reasons,
        kv_usage=usage,
    )


def _silent(alive: Iterable[str], now: datetime) -> dict[str, ReplicaNow]:
    """Replicas that the database knows and Redis does not hear of."""
    gone = Replica.objects.filter(last_seen_at__gte=now - FORGET_AFTER).exclude(state="stopped")
    return {
        row.name: ReplicaNow(
            model=row.model,
            state="lost",
            silent_s=max(0.0, (now - row.last_seen_at).total_seconds()),
            why_silent="The worker fell silent.",
        )
        for row in gone.exclude(name__in=list(alive))[:1000]
        if row.last_seen_at is not None
    }


def read_batches(window_s: int, now: datetime) -> BatchWindow:
    """Sums of the seconds that replicas recorded within a window."""
    throttled = ~Q(throttle_reasons=[]) & ~Q(throttle_reasons=[POWER_CAP])
    rows = BatchRecord.objects.filter(second__gte=now - timedelta(seconds=window_s)).order_by()
    sums = rows.values("model", "replica").annotate(
        num_seconds=Count("id"),
        num_steps=Sum("steps"),
        sequence_steps=Sum(F("batch_size_mean") * F("steps"), filter=Q(max_batch_size__gt=0), default=0.0),
        slot_steps=Sum(F("max_batch_size") * F("steps"), default=0),
        step_ms=Sum(F("step_ms_mean") * F("steps")),
        num_throttled=Count("id", filter=throttled),
    )
    return {
        (row["model"], row["replica"]): BatchSums(
            seconds=row["num_seconds"],
            steps=row["num_steps"],
            sequence_steps=row["sequence_steps"],
            slot_steps=row["slot_steps"],
            step_ms=row["step_ms"],
            throttled=row["num_throttled"],
        )
        for row in sums
    }


def read_requests(window_s: int, now: datetime) -> RequestWindow:
    """Sums of the minutes, or of the hours, that a window touches."""
    grain = Resolution.MINUTE if window_s < MINUTES_BELOW_S else Resolution.HOUR
    first = datetime.fromtimestamp((now.timestamp() - window_s) // grain * grain, UTC)
    rows = RequestRollup.objects.filter(resolution=grain, start__gte=first, start__lte=now).values("model", "tenant")
    names = ("finished", "failed", "refused", "judged", "met", "allowed")
    found: Iterable[Mapping[str, Any]] = rows.annotate(**{f"sum_{name}": Sum(name) for name in names})
    return {(row["model"], row["tenant"]): RequestSums(**{name: row[f"sum_{name}"] for name in names}) for row in found}
