"""Sums history up into minutes and hours, each row exactly once, however late it comes."""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import models, transaction
from django.utils import timezone

from dashboard.models import (
    BatchRollup,
    Grain,
    LatencyRollup,
    RefusalRollup,
    RequestRollup,
    Resolution,
    RollupCheckpoint,
)
from inference.messages import LATENCY_BUCKETS_S
from inference.models import BatchRecord, RequestRecord
from scheduling.models import ServiceLevel
from scheduling.selectors import find_service_levels

logger = logging.getLogger(__name__)

REQUESTS = "requests"
"""The checkpoint whose holder alone adds to the sums of requests."""
ROWS = 2000
"""Rows of history that one transaction sums up."""
ROWS_PER_DELETE = 2000
Key = tuple[Any, ...]
Sums = dict[Key, dict[str, Any]]
Levels = Mapping[tuple[str, int], ServiceLevel]
LATENCIES = ("queue", "ttft", "tpot", "e2e")
LARGEST = frozenset({"batch_size_max", "step_ms_max", "temperature_max"})
"""Fields of which a grain keeps the largest; the others are added up."""


class _OvertakenError(Exception):
    """Another process summed these rows up first."""


def roll_up(budget_s: float, clock: Callable[[], float] = time.monotonic) -> int:
    """Sum up what the historian has written since, for at most `budget_s` seconds; the number of rows.

    The checkpoint counts by the rows' ids, which the historian alone gives, in order: so a row that comes hours late is
    counted as well, once. Checkpoint and sums change in one transaction that begins by moving the checkpoint.
    """
    end_s, num_all = clock() + budget_s, 0
    while True:
        num = _run(REQUESTS, RequestRecord, _add_requests) + _run("batches", BatchRecord, _add_batches)
        num_all += num
        if not num or clock() > end_s:
            return num_all


def prune_rollups(*, days: Mapping[Resolution, int]) -> int:
    """Delete grains older than these numbers of days, a few at a time; how many."""
    num_deleted = 0
    for resolution, num_days in days.items():
        oldest = timezone.now() - timedelta(days=num_days)
        for kind in (RequestRollup, LatencyRollup, BatchRollup, RefusalRollup):
            rows = kind.objects.filter(resolution=resolution, start__lt=oldest)
            while ids := list(rows.values_list("id", flat=True)[:ROWS_PER_DELETE]):
                num_deleted += kind.objects.filter(id__in=ids).delete()[0]
    return num_deleted


def _run(source: str, history: type[models.Model], add: Callable[[Sequence[Any]], None]) -> int:
    checkpoint, _ = RollupCheckpoint.objects.get_or_create(source=source)
    before = checkpoint.last_id
    rows = list(history.objects.filter(id__gt=before).order_by("id")[:ROWS])  # type: ignore[attr-defined]
    if not rows:
        return 0
    try:
        with transaction.atomic():
            mine = RollupCheckpoint.objects.filter(source=source, last_id=before)
            if not mine.update(last_id=rows[-1].pk, updated_at=timezone.now()):
                raise _OvertakenError
            add(rows)
    except _OvertakenError:
        return 0
    return len(rows)


def _add_requests(rows: Sequence[RequestRecord]) -> None:
    levels = find_service_levels()
    counts: Sums = {}
    times: Sums = {}
    for row in rows:
        judged = judge(row, levels)
        for resolution in Resolution.values:
            start = _start(row.finished_at, resolution)
            sums = _at(counts, (resolution, start, row.model, row.tenant, row.priority))
            _add(sums, row.state if row.state in ("finished", "failed") else "cancelled", 1)
            _add(sums, "prompt_tokens", row.prompt_tokens)
            _add(sums, "completion_tokens", row.completion_tokens)
            if judged is not None:
                _add(sums, "judged", 1)
                _add(sums, "met", int(judged[0]))
                _add(sums, "allowed", judged[1])
            _observe(_at(times, (resolution, start, row.model)), row)
    _save(RequestRollup, ("resolution", "start", "model", "tenant", "priority"), counts)
    _save(LatencyRollup, ("resolution", "start", "model"), times)


def judge(row: RequestRecord, levels: Levels) -> tuple[bool, float] | None:
    """Whether a request was served within its service level, and the misses that the objective allows for it.

    None where there is no level, or the client went away. A request that failed has missed it.
    """
    level = find_level(levels, row.tenant, row.priority)
    if level is None or row.state not in ("finished", "failed"):
        return None
    allowed = 1 - level.objective_percent / 100
    if row.state == "failed":
        return False, allowed
    ttft_ok = level.ttft_ms is None or (row.ttft_s is not None and row.ttft_s * 1000 <= level.ttft_ms)
    e2e_ok = level.e2e_ms is None or row.e2e_s * 1000 <= level.e2e_ms
    tpot_ok = level.tpot_ms is None or row.tpot_s is None or row.tpot_s * 1000 <= level.tpot_ms
    return ttft_ok and e2e_ok and tpot_ok, allowed


def find_level(levels: Levels, tenant: str, priority: int) -> ServiceLevel | None:
    """A tenant's own level for a priority, else the default of that priority."""
    return levels.get((tenant, priority)) or levels.get(("", priority))


def _observe(histograms: dict[str, Any], row: RequestRecord) -> None:
    for name in LATENCIES:
        histograms.setdefault(name, [0] * (len(LATENCY_BUCKETS_S) + 1))
    if row.state != "finished":
        return
    spans: dict[str, float | None] = {"ttft": row.ttft_s, "tpot": row.tpot_s, "e2e": row.e2e_s}
    if row.claimed_at:
        spans["queue"] = (row.claimed_at - row.arrived_at).total_seconds()
    for name, span_s in spans.items():
        if span_s is not None:
            histograms[name][bisect_left(LATENCY_BUCKETS_S, span_s)] += 1


def _add_batches(rows: Sequence[BatchRecord]) -> None:
    counts: Sums = {}
    for row in rows:
        for resolution in Resolution.values:
            sums = _at(counts, (resolution, _start(row.second, resolution), row.model, row.replica))
            for name, value in _batch_sums(row).items():
                sums[name] = max(sums.get(name, 0), value) if name in LARGEST else sums.get(name, 0) + value
    _save(BatchRollup, ("resolution", "start", "model", "replica"), counts)


def _batch_sums(row: BatchRecord) -> dict[str, float]:
    told = {"utilization": row.utilization_percent, "memory": row.memory_used_bytes, "power": row.power_w}
    return {
        "seconds": 1,
        "steps": row.steps,
        "sequence_steps": row.batch_size_mean * row.steps,
        "step_ms": row.step_ms_mean * row.steps,
        "batch_size_max": row.batch_size_max,
        "step_ms_max": row.step_ms_max,
        "prompt_tokens": row.prompt_tokens,
        "output_tokens": row.output_tokens,
        "preemptions": row.preemptions,
        "kv_used": row.kv_blocks_used / row.kv_blocks_total if row.kv_blocks_total else 0.0,
        **{name: value or 0.0 for name, value in told.items()},
        **{f"{name}_told": int(value is not None) for name, value in told.items()},
        "temperature_max": row.temperature_c or 0.0,
        "throttled": int(bool(row.throttle_reasons)),
    }


def _start(when: datetime, resolution: int) -> datetime:
    return datetime.fromtimestamp(when.timestamp() // resolution * resolution, UTC)


def _at(sums: Sums, key: Key) -> dict[str, Any]:
    return sums.setdefault(key, {})


def _add(sums: dict[str, Any], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0) + value


def _save(kind: type[Grain], key_fields: Sequence[str], sums: Sums) -> None:
    """Add to the grains that are there, and make those that are not. The checkpoint's lock keeps others out."""
    rows: Any = kind.objects  # type: ignore[attr-defined]
    there = {
        tuple(getattr(row, name) for name in key_fields): row
        for row in rows.filter(
            resolution__in=Resolution.values, start__in={key[1] for key in sums}, model__in={key[2] for key in sums}
        )
    }
    changed, made = [], []
    for key, values in sums.items():
        row = there.get(key)
        if row is None:
            made.append(kind(**dict(zip(key_fields, key, strict=True)), **values))
            continue
        for name, value in values.items():
            setattr(row, name, _combine(name, getattr(row, name), value))
        changed.append(row)
    rows.bulk_create(made)
    fields = _value_fields(kind, key_fields)
    if changed:
        rows.bulk_update(changed, fields, batch_size=50)


def _combine(name: str, old: Any, new: Any) -> Any:
    if isinstance(new, list):
        return [a + b for a, b in zip(old or [0] * len(new), new, strict=True)]
    return max(old, new) if name in LARGEST else old + new


def _value_fields(kind: type[Grain], key_fields: Iterable[str]) -> list[str]:
    return [f.name for f in kind._meta.concrete_fields if f.name not in {"id", *key_fields}]
