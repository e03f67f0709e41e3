"""How hard the queue pushes back: a level from depth, wait and KV memory, whom it refuses, and when to come again.

A level rises at once and falls late: where the reading has stayed below lower thresholds for a while (`settle`), so
that a load that hovers around a threshold does not let requests of a priority in and out by turns.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

from scheduling.core.request import Priority


class Level(IntEnum):
    """Backpressure. Each level refuses one more of the lower priorities."""

    NONE = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4


Thresholds = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackpressureLimits:
    """Where levels 1 to 4 begin."""

    depth: Thresholds = (0.5, 0.7, 0.85, 0.95)
    """Fractions of the queue's bound."""
    wait_s: Thresholds = (30.0, 60.0, 120.0, 300.0)
    kv_usage: Thresholds = (0.90, 0.95, 0.98, 0.995)
    """Fractions of the fleet's KV blocks; count only while requests wait: a full cache without a queue is good use."""
    band: float = 0.1
    """A level for depth or wait is left only below its threshold less this part of it."""
    hold_s: float = 1.0
    """And only after no reading has called for it for this long."""

    def lowered(self) -> "BackpressureLimits":
        """The thresholds below which levels are left; for KV memory, where twice as much is free."""
        keep = 1 - self.band
        return BackpressureLimits(
            depth=_scaled(self.depth, keep, 0.0),
            wait_s=_scaled(self.wait_s, keep, 0.0),
            kv_usage=_scaled(self.kv_usage, 2.0, -1.0),
            band=0.0,
            hold_s=self.hold_s,
        )


def _scaled(four: Thresholds, factor: float, offset: float) -> Thresholds:
    a, b, c, d = four
    return (a * factor + offset, b * factor + offset, c * factor + offset, d * factor + offset)


@dataclass(frozen=True, slots=True)
class Assessment:
    """The level and, in words, what caused it ("" at level none)."""

    level: Level
    reason: str


@dataclass(frozen=True, slots=True)
class Standing:
    """The level in force, and when a reading last called for it."""

    assessment: Assessment
    called_s: float


CALM = Standing(Assessment(Level.NONE, ""), 0.0)
"""Before anything was read."""


def settle(before: Standing, *, rises: Assessment, stays: Assessment, hold_s: float, now_s: float) -> Standing:
    """The level in force after a reading, assessed by the limits (`rises`) and by the lowered ones (`stays`).

    `now_s` by any clock that is the same for all calls.
    """
    level = before.assessment.level
    if rises.level >= level:
        return Standing(rises, now_s)
    if stays.level >= level:
        return Standing(Assessment(level, stays.reason), now_s)
    if abs(now_s - before.called_s) < hold_s:
        return before
    return Standing(stays, now_s)


def assess(
    limits: BackpressureLimits, *, depth: int, queue_limit: int, wait_s: float | None, kv_usage: float
) -> Assessment:
    """The highest level that any of depth, estimated wait (None: unknown) and KV use (0 to 1) calls for."""
    fill = depth / queue_limit
    signals = [(_level(fill, limits.depth), f"queue {fill:.0%} full ({depth} of {queue_limit})")]
    if wait_s is not None:
        signals.append((_level(wait_s, limits.wait_s), f"estimated wait {wait_s:.0f} s"))
    if depth > 0:
        signals.append((_level(kv_usage, limits.kv_usage), f"KV memory {kv_usage:.1%} used with {depth} waiting"))
    level, reason = max(signals, key=lambda signal: signal[0])
    return Assessment(level, reason if level else "")


def _level(value: float, thresholds: tuple[float, ...]) -> Level:
    return Level(sum(value >= threshold for threshold in thresholds))


_ADMITTED = {
    Level.NONE: Priority.BULK,
    Level.LOW: Priority.LOW,
    Level.MEDIUM: Priority.NORMAL,
    Level.HIGH: Priority.HIGH,
    Level.CRITICAL: Priority.REALTIME,
}


def admitted_priorities(level: Level) -> Priority:
    """The lowest priority still admitted: at level low bulk is refused, at critical all but critical and realtime."""
    return _ADMITTED[level]


def release_depth(priority: int, queue_limit: int, limits: BackpressureLimits) -> int:
    """The depth from which a refused priority is let in again, as far as the depth decides."""
    refusing = _refusing_level(priority)
    if refusing is None:
        return queue_limit
    return max(1, math.floor(limits.lowered().depth[refusing - 1] * queue_limit))


def depth_limit(priority: int, queue_limit: int, level: Level, limits: BackpressureLimits) -> int:
    """The depth from which a request of this priority is refused, for `enqueue`; 0 where the level refuses it outright.

    A level is assessed a few times a second, a burst fills a queue in between; so each priority has its bound also in
    the atomic enqueue: the depth at which the level that refuses it begins.
    """
    if priority > admitted_priorities(level):
        return 0
    refusing = _refusing_level(priority)
    if refusing is None:
        return queue_limit
    return max(1, math.ceil(limits.depth[refusing - 1] * queue_limit))


def excess_wait_s(priority: int, wait_s: float | None, limits: BackpressureLimits) -> float:
    """By how much the estimated wait is above that at which this priority is let in again: where nothing comes, it
    falls by a second each second.
    """
    refusing = _refusing_level(priority)
    return 0.0 if refusing is None or wait_s is None else max(0.0, wait_s - limits.lowered().wait_s[refusing - 1])


def _refusing_level(priority: int) -> Level | None:
    """The first level that refuses this priority; None for those that none does."""
    return next((level for level in Level if priority > admitted_priorities(level)), None)


class DrainRate:
    """Requests and tokens a second that leave the queue: an exponentially forgetting average of cumulative counters."""

    def __init__(self, time_constant_s: float = 15.0) -> None:
        self._time_constant_s = time_constant_s
        self._last: tuple[float, float, float] | None = None
        self._weight = 0.0
        self._requests = 0.0
        self._tokens = 0.0

    def update(self, now_s: float, requests_total: float, tokens_total: float) -> None:
        """Feed the counters (`claimed_total`, `claimed_tokens_total`) as they stand at `now_s`.

        A counter that went backwards (Redis lost its data) starts the average afresh.
        """
        last = self._last
        if last is not None and now_s <= last[0]:
            return
        self._last = (now_s, requests_total, tokens_total)
        if last is None:
            return
        if requests_total < last[1] or tokens_total < last[2]:
            self._weight = self._requests = self._tokens = 0.0
            return
        elapsed = now_s - last[0]
        keep = math.exp(-elapsed / self._time_constant_s)
        # Sums of what drained and of time decay alike, so that their quotient has no bias at the start.
        self._weight = self._weight * keep + elapsed
        self._requests = self._requests * keep + requests_total - last[1]
        self._tokens = self._tokens * keep + tokens_total - last[2]

    @property
    def requests_per_s(self) -> float:
        return self._requests / self._weight if self._weight else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._weight if self._weight else 0.0

    def wait_s(self, waiting_tokens: float) -> float | None:
        """Seconds until that much has drained; 0 with nothing waiting, None while nothing drains."""
        if waiting_tokens <= 0:
            return 0.0
        return waiting_tokens / self.tokens_per_s if self.tokens_per_s > 0 else None

    def slot_s(self, num_here: int, num_own: int) -> float | None:
        """Seconds until one of `num_own` requests, of `num_here` that wait or run in all, has probably ended.

        What is here leaves at the rate at which the queue drains (Little's law), each as likely as another to be next.
        None while nothing drains.
        """
        return num_here / (self.requests_per_s * max(1, num_own)) if self.requests_per_s > 0 else None

    def retry_after_s(self, depth: int, target_depth: int, *, unknown_s: int = 30, maximum_s: int = 600) -> int:
        """Whole seconds until the queue has drained from `depth` to below `target_depth`: for `Retry-After`."""
        return _retry_after_s(max(1, depth - target_depth + 1), self.requests_per_s, unknown_s, maximum_s)

    def tokens_retry_after_s(self, excess: int, *, unknown_s: int = 30, maximum_s: int = 600) -> int:
        """The same until `excess` of the tokens that wait have drained."""
        return _retry_after_s(excess, self.tokens_per_s, unknown_s, maximum_s)


def _retry_after_s(amount: float, per_s: float, unknown_s: int, maximum_s: int) -> int:
    return min(maximum_s, max(1, math.ceil(amount / per_s))) if per_s > 0 else unknown_s
