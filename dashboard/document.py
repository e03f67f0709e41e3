"""Makes the live page's document and history rows from readings; keeps the rates and windows this takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dashboard.latency import MEASURES, LatencyWindow, Percentiles, summarise
from dashboard.rates import RateMeter
from dashboard.readings import Reading
from dashboard.state import Document, prune
from inference.messages import ReplicaStatus, Telemetry
from scheduling.core.answers import QueueSnapshot
from scheduling.core.backpressure import Assessment, BackpressureLimits, admitted_priorities, assess
from scheduling.core.drain import BacklogRate
from scheduling.core.policies import POLICIES
from scheduling.core.request import Priority

MAX_TENANTS = 24
"""Tenants shown one by one in a queue; the rest is a sum."""
MAX_SLOTS = 256
MAX_CHANGES = 6
"""Latest changes of a replica's batch size that are shown."""
WAITS = dict(zip(MEASURES, ("queue", "ttft", "tpot", "e2e"), strict=True))


@dataclass(slots=True)
class _ModelMeters:
    arrivals: RateMeter = field(default_factory=RateMeter)
    claims: RateMeter = field(default_factory=RateMeter)
    completions: RateMeter = field(default_factory=RateMeter)
    backlog: BacklogRate = field(default_factory=BacklogRate)

    def observe(self, snapshot: QueueSnapshot, now_s: float) -> None:
        self.arrivals.observe(now_s, snapshot.enqueued_total)
        self.claims.observe(now_s, snapshot.claimed_total)
        self.completions.observe(now_s, snapshot.finished_total + snapshot.cancelled_total)
        self.backlog.observe(snapshot, now_s)


class DocumentBuilder:
    """Turns one reading after the other into documents."""

    def __init__(self, *, queue_limit: int, limits: BackpressureLimits | None = None) -> None:
        self._queue_limit = queue_limit
        self._limits = limits or BackpressureLimits()
        self._meters: dict[str, _ModelMeters] = {}
        self._windows: dict[str, LatencyWindow] = {}

    def build(self, reading: Reading) -> Document:
        """The parts `models` and `replicas` of the document."""
        for name in self._windows.keys() - reading.replicas.keys() - reading.lost.keys():
            del self._windows[name]
        for name in self._meters.keys() - reading.deployments.keys():
            del self._meters[name]
        for name, status in reading.replicas.items():
            self._windows.setdefault(name, LatencyWindow()).observe(status)
        replicas = {name: _replica(status) for name, status in reading.replicas.items()}
        replicas |= {name: {**_replica(status), "state": "lost", "slots": []} for name, status in reading.lost.items()}
        models = {name: self._model(name, reading) for name in reading.deployments}
        return {"models": prune(models), "replicas": prune(replicas)}

    def _model(self, name: str, reading: Reading) -> Document:
        snapshot = reading.snapshots[name]
        meters = self._meters.setdefault(name, _ModelMeters())
        meters.observe(snapshot, reading.time_s)
        mine = [status for status in reading.replicas.values() if status.model == name]
        wait_s = meters.backlog.wait_s(snapshot.waiting_tokens)
        assessment = reading.levels.get(name) or assess(
            self._limits,
            depth=snapshot.depth,
            queue_limit=self._queue_limit,
            wait_s=wait_s,
            kv_usage=_kv_usage(mine) or 0.0,
        )
        oldest_s = snapshot.oldest_arrival_s
        return {
            "depth": snapshot.depth,
            "queue_limit": self._queue_limit,
            "waiting_tokens": snapshot.waiting_tokens,
            "by_priority": {str(p): n for p, n in sorted(snapshot.by_priority.items()) if n},
            **_tenants(snapshot.by_tenant),
            "oldest_wait_s": None if oldest_s is None else round(max(0.0, reading.time_s - oldest_s), 1),
            "estimated_wait_s": None if wait_s is None else round(wait_s, 1),
            "running": snapshot.running,
            "arrivals_per_s": round(meters.arrivals.per_s, 2),
            "claims_per_s": round(meters.claims.per_s, 2),
            "completions_per_s": round(meters.completions.per_s, 2),
            "tokens_per_s": round(sum(status.tokens_per_s for status in mine), 1),
            "batch_tokens": sum(status.batch_tokens for status in mine),
            "kv_usage": None if (usage := _kv_usage(mine)) is None else round(usage, 4),
            "requeued_total": snapshot.requeued_total,
            "finished_total": snapshot.finished_total,
            "backpressure": _backpressure(assessment),
            "policy": _policy(snapshot),
            "waits": self._waits(mine, reading.time_s),
        }

    def _waits(self, replicas: Iterable[ReplicaStatus], now_s: float) -> Document:
        # The window is judged by the clock that stamped the samples, so that skew between hosts does no harm.
        mine = list(replicas)
        clock_s = max((status.time_s for status in mine), default=now_s)
        windows = [self._windows[status.replica] for status in mine if status.replica in self._windows]
        found = {short: summarise(windows, measure, clock_s) for measure, short in WAITS.items()}
        return {short: _percentiles(value) for short, value in found.items() if value is not None}


def history_row(time_s: float, model: Mapping[str, Any]) -> list[Any]:
    """One second of a model, as charts take it: see `static/js/rows.js` for the columns."""
    waits = model["waits"]
    return [
        round(time_s, 2),
        [model["by_priority"].get(str(int(level)), 0) for level in Priority],
        dict(model["by_tenant"]),
        model["running"],
        model["tokens_per_s"],
        model["arrivals_per_s"],
        model["completions_per_s"],
        waits.get("queue", {}).get("p50_s"),
        waits.get("ttft", {}).get("p50_s"),
        waits.get("ttft", {}).get("p99_s"),
        model["backpressure"]["level"],
    ]


def _tenants(by_tenant: Mapping[str, int]) -> Document:
    """The longest queues by name, in order of name so that little changes between updates."""
    longest = sorted(by_tenant.items(), key=lambda item: -item[1])
    shown, rest = longest[:MAX_TENANTS], longest[MAX_TENANTS:]
    others = sum(n for _, n in rest)
    return {"by_tenant": {name: n for name, n in sorted(shown) if n}, "other_tenants": others or None}


def _backpressure(assessment: Assessment) -> Document:
    lowest = admitted_priorities(assessment.level)
    refused = [level.name.lower() for level in Priority if level > lowest]
    return {
        "level": int(assessment.level),
        "name": assessment.level.name.lower(),
        "reason": assessment.reason,
        "refused": refused,
    }


def _policy(snapshot: QueueSnapshot) -> Document:
    kind = POLICIES.get(snapshot.policy)
    return {
        "name": snapshot.policy,
        "revision": snapshot.revision,
        "params": dict(snapshot.params),
        "description": kind.description if kind else "",
        "guarantee": kind.guarantee if kind else "",
        "source": kind.source if kind else "",
    }


def _kv_usage(replicas: Iterable[ReplicaStatus]) -> float | None:
    mine = list(replicas)
    total = sum(status.kv_blocks_total for status in mine)
    return sum(status.kv_blocks_used for status in mine) / total if total else None


def _percentiles(value: Percentiles) -> Document:
    return {"p50_s": round(value.p50_s, 4), "p99_s": round(value.p99_s, 4), "num": value.num}


def _replica(status: ReplicaStatus) -> Document:
    return {
        "model": status.model,
        "host": status.host,
        "pid": status.pid,
        "state": status.state,
        "detail": status.detail,
        "started_s": round(status.started_s, 1),
        "heard_s": round(status.time_s, 2),
        "mode": status.mode,
        "max_batch_size": status.max_batch_size,
        "slots": [
            [s.request_id, s.tenant, s.priority, s.prompt_tokens, s.output_tokens, s.max_tokens]
            for s in status.slots[:MAX_SLOTS]
        ],
        "batch_size": len(status.slots),
        "batch_tokens": status.batch_tokens,
        "kv_blocks_total": status.kv_blocks_total,
        "kv_blocks_used": status.kv_blocks_used,
        "kv_block_size": status.kv_block_size,
        "tokens_per_s": round(status.tokens_per_s, 1),
        "step_ms_p50": round(status.step_ms_p50, 2),
        "step_ms_p99": round(status.step_ms_p99, 2),
        "preemptions": status.preemptions,
        "draft_tokens": status.draft_tokens,
        "accepted_tokens": status.accepted_tokens,
        "accepted_per_step": round(status.accepted_tokens / status.steps, 2) if status.steps else 0.0,
        "policy": status.policy,
        "policy_revision": status.policy_revision,
        "sizing": status.sizing,
        "sizing_params": dict(status.sizing_params),
        "size_changes": [
            [round(change.time_s, 1), change.batch_size, change.reason] for change in status.size_changes[-MAX_CHANGES:]
        ],
        "trigger": status.trigger,
        "trigger_reason": status.trigger_reason,
        "triggers": dict(status.triggers),
        "restarts": dict(status.restarts),
        "telemetry": _telemetry(status.telemetry),
    }


def _telemetry(telemetry: Telemetry | None) -> Document | None:
    if telemetry is None:
        return None
    return {
        "source": telemetry.source,
        "device": telemetry.device,
        "utilization_percent": _rounded(telemetry.utilization_percent),
        "memory_used_bytes": telemetry.memory_used_bytes,
        "memory_total_bytes": telemetry.memory_total_bytes,
        "temperature_c": _rounded(telemetry.temperature_c),
        "power_w": _rounded(telemetry.power_w),
        "throttle_reasons": telemetry.throttle_reasons,
        "stale_s": _rounded(telemetry.stale_s) if telemetry.stale_s else None,
        "lost": telemetry.lost or None,
        "detail": telemetry.detail or None,
        "mig": telemetry.mig or None,
        "power_limit_w": _rounded(telemetry.power_limit_w),
        "sm_clock_mhz": _rounded(telemetry.sm_clock_mhz),
        "memory_clock_mhz": _rounded(telemetry.memory_clock_mhz),
        "ecc_uncorrected": telemetry.ecc_uncorrected,
        "process_memory_bytes": telemetry.process_memory_bytes,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
