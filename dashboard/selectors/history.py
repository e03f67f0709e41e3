"""What a model did over minutes, hours and days, as series on an even grid; from seconds or from sums, as fits."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from django.db.models import Case, Count, F, FloatField, Max, Q, Sum, Value, When
from django.db.models.functions import Cast

from dashboard.latency import quantile
from dashboard.models import BatchRollup, LatencyRollup, RequestRollup, Resolution
from inference.models import BatchRecord
from scheduling.models import PolicyRevision

SECONDS_UP_TO_S = 900
MINUTES_UP_TO_S = 12 * 3600
MAX_SPAN = timedelta(days=92)
MAX_CHANGES = 200
Source = Literal["batch", "requests", "latency"]
Row = Mapping[str, Any]


class PeriodError(ValueError):
    """The period cannot be shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure over time. `value` makes it from the sums of a grain of so many seconds; None where there is none."""

    title: str
    unit: str
    source: Source
    value: Callable[[Row, int], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """A span on the grid of a resolution: `start` included, `end` not. `resolution` in seconds."""

    start: datetime
    end: datetime
    resolution: int

    @property
    def num_grains(self) -> int:
        return int((self.end - self.start).total_seconds()) // self.resolution

    def shifted(self, seconds: float) -> "Period":
        """The same span, earlier by about this much, still on the grid."""
        grains = timedelta(seconds=-(-seconds // self.resolution) * self.resolution)
        return Period(start=self.start - grains, end=self.end - grains, resolution=self.resolution)


def _rate(name: str, per_s: float = 1.0) -> Callable[[Row, int], float | None]:
    return lambda row, grain_s: row[name] / grain_s * per_s


def _ratio(name: str, of: str, factor: float = 1.0) -> Callable[[Row, int], float | None]:
    return lambda row, grain_s: factor * row[name] / row[of] if row[of] else None


def _plain(name: str) -> Callable[[Row, int], float | None]:
    return lambda row, grain_s: row[name] or None


def _quantile(name: str, q: float) -> Callable[[Row, int], float | None]:
    return lambda row, grain_s: quantile(row[name], q) if row[name] else None


def _batch(title: str, unit: str, value: Callable[[Row, int], float | None]) -> Metric:
    return Metric(title=title, unit=unit, source="batch", value=value)


def _of_requests(title: str, unit: str, value: Callable[[Row, int], float | None]) -> Metric:
    return Metric(title=title, unit=unit, source="requests", value=value)


METRICS: Mapping[str, Metric] = {
    "output_tokens": _batch("Output", "tokens/s", _rate("output_tokens")),
    "completions": _of_requests("Completed", "requests/s", _rate("finished")),
    **{
        f"{name}_p{percent}": Metric(
            title=f"{title}, p{percent}", unit="s", source="latency", value=_quantile(name, percent / 100)
        )
        for name, title in (("ttft", "TTFT"), ("queue", "Queue time"), ("e2e", "End to end"), ("tpot", "TPOT"))
        for percent in (50, 99)
    },
    "attainment": _of_requests("Within the SLA", "%", _ratio("met", "judged", 100)),
    "failures": _of_requests("Failed", "requests/min", _rate("failed", 60)),
    "cancellations": _of_requests("Cancelled", "requests/min", _rate("cancelled", 60)),
    "prompt_tokens": _batch("Prompts", "tokens/s", _rate("prompt_tokens")),
    "batch_size": _batch("Batch size, mean", "requests", _ratio("sequence_steps", "steps")),
    "batch_size_max": _batch("Batch size, largest", "requests", _plain("batch_size_max")),
    "step_ms": _batch("Step time, mean", "ms", _ratio("step_ms", "steps")),
    "step_ms_max": _batch("Step time, longest", "ms", _plain("step_ms_max")),
    "kv": _batch("KV cache in use", "%", _ratio("kv_used", "seconds", 100)),
    "preemptions": _batch("Preemptions", "per min", _rate("preemptions", 60)),
    "utilization": _batch("Device utilisation", "%", _ratio("utilization", "utilization_told")),
    "memory": _batch("Device memory", "bytes", _ratio("memory", "memory_told")),
    "power": _batch("Device power", "W", _ratio("power", "power_told")),
    "temperature": _batch("Device temperature", "°C", _plain("temperature_max")),
    "throttled": _batch("Throttled", "% of time", _ratio("throttled", "seconds", 100)),
}
DEFAULTS = ("output_tokens", "completions", "ttft_p99", "queue_p50", "attainment", "batch_size")

_SUMMED = (
    "seconds", "steps", "sequence_steps", "step_ms", "prompt_tokens", "output_tokens", "preemptions", "kv_used",
    "utilization", "utilization_told", "memory", "memory_told", "power", "power_told", "throttled",
)  # fmt: skip
_LARGEST = ("batch_size_max", "step_ms_max", "temperature_max")
_COUNTED = ("finished", "failed", "cancelled", "judged", "met")


def choose_period(start: datetime, end: datetime) -> Period:
    """The finest grid that keeps the span's points few enough to draw. Raises PeriodError."""
    span = end - start
    if span <= timedelta(0):
        raise PeriodError("The end must be after the beginning.")
    if span > MAX_SPAN:
        raise PeriodError(f"A period is at most {MAX_SPAN.days} days long.")
    span_s = span.total_seconds()
    grain_s = 1 if span_s <= SECONDS_UP_TO_S else 60 if span_s <= MINUTES_UP_TO_S else 3600
    first_s = start.timestamp() // grain_s * grain_s
    last_s = -(-end.timestamp() // grain_s) * grain_s
    return Period(
        start=datetime.fromtimestamp(first_s, UTC), end=datetime.fromtimestamp(last_s, UTC), resolution=grain_s
    )


def read_series(
    model: str, period: Period, names: Iterable[str], *, replica: str = "", clock: Callable[[], float] = time.time
) -> dict[str, list[float | None]]:
    """A value per grain for each metric; None where nothing was recorded.

    What comes from requests has no seconds: its minutes are repeated. `replica` narrows what replicas recorded. Rates
    of the grain that goes on are by the time since its beginning.
    """
    series: dict[str, list[float | None]] = {}
    wanted = {name: METRICS[name] for name in names}
    for source in ("batch", "requests", "latency"):
        metrics = {name: metric for name, metric in wanted.items() if metric.source == source}
        if metrics:
            series |= _read_source(source, metrics, model, period, replica, clock())
    return {name: series[name] for name in wanted}


def read_changes(model: str, period: Period) -> list[PolicyRevision]:
    """Switches of policy within a period, oldest first."""
    rows = PolicyRevision.objects.filter(model=model, created_at__gte=period.start, created_at__lt=period.end)
    return list(rows.order_by("created_at")[:MAX_CHANGES])


def _read_source(
    source: Source, metrics: Mapping[str, Metric], model: str, period: Period, replica: str, now_s: float
) -> dict[str, list[float | None]]:
    grain_s = period.resolution if source == "batch" else max(60, period.resolution)
    if source == "batch":
        rows = _batches(model, period, replica)
    else:
        aligned = Period(start=_floor(period.start, grain_s), end=period.end, resolution=grain_s)
        rows = _requests(model, aligned) if source == "requests" else _latencies(model, aligned)
    found = {row["start"].timestamp(): row for row in rows}
    first_s = period.start.timestamp()
    at = [(first_s + i * period.resolution) // grain_s * grain_s for i in range(period.num_grains)]
    spans = [min(grain_s, max(1, int(now_s - when))) for when in at]
    return {
        name: [
            None if (row := found.get(when)) is None else _rounded(metric.value(row, span_s))
            for when, span_s in zip(at, spans, strict=True)
        ]
        for name, metric in metrics.items()
    }


def _batches(model: str, period: Period, replica: str) -> Iterable[Row]:
    if period.resolution == 1:
        return _seconds(model, period, replica)
    rows = BatchRollup.objects.filter(
        resolution=period.resolution, model=model, start__gte=period.start, start__lt=period.end
    )
    if replica:
        rows = rows.filter(replica=replica)
    sums = {f"{name}_": Sum(name) for name in _SUMMED} | {f"{name}_": Max(name) for name in _LARGEST}
    return _renamed(rows.values("start").annotate(**sums))


def _seconds(model: str, period: Period, replica: str) -> Iterable[Row]:
    """The sums of `dashboard.rollups`, over replicas, for each second."""
    rows = BatchRecord.objects.filter(model=model, second__gte=period.start, second__lt=period.end)
    if replica:
        rows = rows.filter(replica=replica)
    blocks = Cast("kv_blocks_total", FloatField())
    kv = Case(When(kv_blocks_total__gt=0, then=F("kv_blocks_used") / blocks), default=Value(0.0))
    found = rows.values(start=F("second")).annotate(
        seconds=Count("id"),
        kv_used=Sum(kv),
        sequence_steps=Sum(F("batch_size_mean") * F("steps")),
        step_ms=Sum(F("step_ms_mean") * F("steps")),
        utilization=Sum("utilization_percent", default=0.0),
        utilization_told=Count("utilization_percent"),
        memory=Sum("memory_used_bytes", default=0),
        memory_told=Count("memory_used_bytes"),
        power=Sum("power_w", default=0.0),
        power_told=Count("power_w"),
        temperature_max=Max("temperature_c"),
        throttled=Count("id", filter=~Q(throttle_reasons=[])),
        **{f"{name}_": Sum(name) for name in ("steps", "prompt_tokens", "output_tokens", "preemptions")},
        **{f"{name}_": Max(name) for name in ("batch_size_max", "step_ms_max")},
    )
    return _renamed(found)


def _renamed(rows: Iterable[Row]) -> Iterable[Row]:
    """A sum may not have the name of a column in a query; here it gets it."""
    return ({name.removesuffix("_"): value for name, value in row.items()} for row in rows)


def _requests(model: str, period: Period) -> Iterable[Row]:
    rows = RequestRollup.objects.filter(
        resolution=_resolution(period), model=model, start__gte=period.start, start__lt=period.end
    )
    return _renamed(rows.values("start").annotate(**{f"{name}_": Sum(name) for name in _COUNTED}))


def _latencies(model: str, period: Period) -> Iterable[Row]:
    rows = LatencyRollup.objects.filter(
        resolution=_resolution(period), model=model, start__gte=period.start, start__lt=period.end
    )
    return rows.values("start", "queue", "ttft", "tpot", "e2e")


def _resolution(period: Period) -> int:
    return Resolution.MINUTE if period.resolution <= Resolution.MINUTE else Resolution.HOUR


def _floor(when: datetime, grain_s: int) -> datetime:
    return datetime.fromtimestamp(when.timestamp() // grain_s * grain_s, UTC)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def metric_names(wanted: Sequence[str]) -> list[str]:
    """Those of `wanted` that there are, in the order of METRICS; the defaults where none is."""
    chosen = [name for name in METRICS if name in wanted]
    return chosen or list(DEFAULTS)
