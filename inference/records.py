"""History events as database rows."""

import math
from datetime import UTC, datetime
from typing import Any

from inference.messages import MAX_BURSTS, MAX_MARKS, BatchEvent, HistoryEvent, RequestEvent, Telemetry
from inference.models import BatchRecord, RequestRecord

MAX_COUNT = 2**31 - 1
"""Largest value of an integer column."""

MAX_BYTES = 2**63 - 1
MAX_CHANGES = 32
"""Entries of a list in one row."""


class UnusableEventError(ValueError):
    """The event decodes, but no row can hold it."""


def make_row(event: HistoryEvent) -> RequestRecord | BatchRecord:
    """The row of an event. Raises UnusableEventError, on both databases alike."""
    try:
        return _request_row(event) if isinstance(event, RequestEvent) else _batch_row(event)
    except (OverflowError, OSError, ValueError) as error:
        raise UnusableEventError(str(error)) from error


def _request_row(event: RequestEvent) -> RequestRecord:
    return RequestRecord(
        request_id=_text(event.id, 64),
        model=_text(event.model, 128),
        tenant=_text(event.tenant, 63),
        priority=_count(event.priority),
        endpoint=_text(event.endpoint, 32),
        state=event.state,
        finish_reason=event.finish_reason,
        error_code=_text(event.error_code, 64),
        arrived_at=_moment(event.arrival_s),
        claimed_at=_moment_or_none(event.claimed_s),
        first_token_at=_moment_or_none(event.first_token_s),
        finished_at=_moment(event.finished_s),
        deadline_at=_moment_or_none(event.deadline_s),
        prompt_tokens=_count(event.prompt_tokens),
        completion_tokens=_count(event.completion_tokens),
        max_tokens=_count(event.max_tokens),
        attempts=_count(event.attempts),
        replica=_text(event.replica, 128),
        policy=_text(event.policy, 63),
        policy_revision=_count(event.policy_revision),
        user=_text(event.user, 128),
        timeline=_timeline(event),
    )


def _timeline(event: RequestEvent) -> dict[str, Any]:
    """What there is to tell; nothing for a request that no worker took up."""
    marks = [[_count(mark.ms), mark.kind, _count(mark.tokens)] for mark in event.marks[:MAX_MARKS]]
    bursts = [[_count(ms), _count(num)] for ms, num in event.bursts[:MAX_BURSTS]]
    told = {"marks": marks, "tokens": bursts, "span_ms": _count(event.burst_ms) if bursts else 0}
    return {name: value for name, value in told.items() if value}


def _batch_row(event: BatchEvent) -> BatchRecord:
    row = BatchRecord(
        replica=_text(event.replica, 128),
        model=_text(event.model, 128),
        second=_moment(event.second_s),
        steps=_count(event.steps),
        batch_size_mean=_number(event.batch_size_mean),
        batch_size_max=_count(event.batch_size_max),
        prompt_tokens=_count(event.prompt_tokens),
        output_tokens=_count(event.output_tokens),
        step_ms_mean=_number(event.step_ms_mean),
        step_ms_max=_number(event.step_ms_max),
        kv_blocks_used=_count(event.kv_blocks_used),
        kv_blocks_total=_count(event.kv_blocks_total),
        preemptions=_count(event.preemptions),
        mode=event.mode,
        policy=_text(event.policy, 63),
        policy_revision=_count(event.policy_revision),
        max_batch_size=_count(event.max_batch_size),
        sizing=_text(event.sizing, 32),
        size_changes=[
            [_number(c.time_s), _count(c.batch_size), _text(c.reason, 200)] for c in event.size_changes[:MAX_CHANGES]
        ],
        triggers={_text(name, 32): _count(num) for name, num in list(event.triggers.items())[:MAX_CHANGES]},
        trigger_reason=_text(event.trigger_reason, 200),
        prefix_tokens=_count(event.prefix_tokens),
        prefix_hit_tokens=_count(event.prefix_hit_tokens),
        swapped_out_blocks=_count(event.swapped_out_blocks),
        swapped_in_blocks=_count(event.swapped_in_blocks),
        draft_tokens=_count(event.draft_tokens),
        accepted_tokens=_count(event.accepted_tokens),
        busy_ms=_number(event.busy_ms),
        prefill_tokens=_count(event.prefill_tokens, MAX_BYTES),
        decode_sequences=_count(event.decode_sequences, MAX_BYTES),
        context_tokens=_count(event.context_tokens, MAX_BYTES),
        attention_pairs=_count(event.attention_pairs, MAX_BYTES),
        step_cost=[_number(value) for value in event.step_cost[:MAX_CHANGES]],
    )
    if event.telemetry is not None:
        _add_telemetry(row, event.telemetry)
    return row


def _add_telemetry(row: BatchRecord, telemetry: Telemetry) -> None:
    row.telemetry_source = telemetry.source
    row.device = _text(telemetry.device, 255)
    if telemetry.stale_s or telemetry.lost:  # old figures are none of this second's
        return
    row.utilization_percent = _number_or_none(telemetry.utilization_percent)
    row.memory_used_bytes = _bytes(telemetry.memory_used_bytes)
    row.memory_total_bytes = _bytes(telemetry.memory_total_bytes)
    row.temperature_c = _number_or_none(telemetry.temperature_c)
    row.power_w = _number_or_none(telemetry.power_w)
    row.throttle_reasons = [_text(reason, 64) for reason in telemetry.throttle_reasons]
    row.power_limit_w = _number_or_none(telemetry.power_limit_w)
    row.sm_clock_mhz = _number_or_none(telemetry.sm_clock_mhz)
    row.memory_clock_mhz = _number_or_none(telemetry.memory_clock_mhz)
    row.ecc_uncorrected = _bytes(telemetry.ecc_uncorrected)
    row.process_memory_bytes = _bytes(telemetry.process_memory_bytes)


def _text(value: str, max_chars: int) -> str:
    """Cut to the column's length and without NUL, which PostgreSQL refuses."""
    return value.replace("\0", "")[:max_chars]


def _count(value: int, most: int = MAX_COUNT) -> int:
    if not 0 <= value <= most:
        raise UnusableEventError(f"{value} is no count")
    return value


def _bytes(value: int | None) -> int | None:
    if value is not None and not 0 <= value <= MAX_BYTES:
        raise UnusableEventError(f"{value} is no number of bytes")
    return value


def _number(value: float) -> float:
    if not math.isfinite(value):
        raise UnusableEventError(f"{value} is no number")
    return value


def _number_or_none(value: float | None) -> float | None:
    return value if value is None else _number(value)


def _moment(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)


def _moment_or_none(unix_s: float | None) -> datetime | None:
    return None if unix_s is None else _moment(unix_s)
