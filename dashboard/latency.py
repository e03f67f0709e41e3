"""Percentiles of the last minute, from the cumulative histograms that replicas publish."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inference.messages import LATENCY_BUCKETS_S, Histogram, ReplicaStatus

WINDOW_S = 60.0
MEASURES = ("queue_time", "time_to_first_token", "time_per_output_token", "end_to_end")
NUM_BUCKETS = len(LATENCY_BUCKETS_S) + 1


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Estimates in seconds, and how many requests they stand on."""

    p50_s: float
    p99_s: float
    num: int


def quantile(counts: Sequence[int], q: float) -> float | None:
    """The `q`-quantile (0 to 1) in seconds, linear within its bucket; None without samples.

    What lies beyond the last bound is given as that bound: an estimate from below.
    """
    total = sum(counts)
    if total <= 0:
        return None
    wanted, below, seen = q * total, 0.0, 0
    for count, bound in zip(counts, (*LATENCY_BUCKETS_S, LATENCY_BUCKETS_S[-1]), strict=True):
        if count and seen + count >= wanted:
            return below + (bound - below) * (wanted - seen) / count
        seen, below = seen + count, bound
    return LATENCY_BUCKETS_S[-1]


class LatencyWindow:
    """Remembers one replica's histograms for a minute; the difference of newest and oldest is that minute's."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._started_s: float | None = None
        self._samples: deque[tuple[float, dict[str, list[int]]]] = deque()

    def observe(self, status: ReplicaStatus) -> None:
        """Take a reading, at most two a second. A replica that started again counts from zero."""
        if self._started_s != status.started_s:
            first_sight = self._started_s is None
            self._samples.clear()
            self._started_s = status.started_s
            # Before a restart that we witnessed, or one within the window, stands an empty histogram.
            if not first_sight or status.time_s - status.started_s <= self._window_s:
                self._samples.append((status.started_s, {}))
        counts = {name: _counts(getattr(status, name)) for name in MEASURES}
        if len(self._samples) > 1 and status.time_s - self._samples[-2][0] < 0.5:
            self._samples[-1] = (status.time_s, counts)
        else:
            self._samples.append((status.time_s, counts))
        while len(self._samples) > 2 and self._samples[1][0] <= status.time_s - self._window_s:
            self._samples.popleft()

    def counts(self, measure: str, now_s: float) -> list[int]:
        """Samples per bucket within the window; nothing where the replica fell silent that long ago."""
        if not self._samples or now_s - self._samples[-1][0] > self._window_s:
            return [0] * NUM_BUCKETS
        newest = self._samples[-1][1].get(measure) or [0] * NUM_BUCKETS
        oldest = self._samples[0][1].get(measure) or [0] * NUM_BUCKETS
        return [max(0, new - old) for new, old in zip(newest, oldest, strict=True)]


def summarise(windows: Iterable[LatencyWindow], measure: str, now_s: float) -> Percentiles | None:
    """Percentiles over several replicas; None where no request counted within the window."""
    counts = [0] * NUM_BUCKETS
    for window in windows:
        counts = [a + b for a, b in zip(counts, window.counts(measure, now_s), strict=True)]
    p50, p99 = quantile(counts, 0.5), quantile(counts, 0.99)
    if p50 is None or p99 is None:
        return None
    return Percentiles(p50, p99, sum(counts))


def _counts(histogram: Histogram | None) -> list[int]:
    if histogram is None or len(histogram.counts) != NUM_BUCKETS:
        return [0] * NUM_BUCKETS
    return list(histogram.counts)
