"""Gradient: as many at once as are taken before latency rises, where nobody says what the latency should be."""

import math
from collections.abc import Mapping
from random import Random

from scheduling.core.sizing.controller import Controller, Observation

WEIGHT = 0.3
"""Of the latest period in what counts as the latency of now."""
GROW_BELOW = 0.75
"""Share of the tolerance up to which it grows; between this and the whole it rests."""
LEAST_LEFT = 0.5
"""What is left at least when it shrinks by latency."""
REST_S = 1.0
"""After a change, at least: until answers of the new size can have come."""
FALLEN = 0.7
"""A latency below this share of what it was at twice the size: the larger size only let requests wait elsewhere."""


class Gradient(Controller):
    """Compares the latency of now with the best one known, of the first token and of each token after it.

    The size shrinks by the ratio of the two, and grows by its square root while work waits, as in Gradient2Limit of the
    concurrency-limits of Netflix. The best latency is known as in TCP Vegas the base round trip (Brakmo and Peterson,
    1995): it falls at once; here it rises by `drift` a second, so that a changed load is not measured by an old one.

    A best latency that was only ever seen at this size may be one of overload. Then half the size is tried every
    `probe_s`, as BBR probes for its round trip (Cardwell et al., 2016), and again half while that lowers latency.
    """

    name = "gradient"

    def __init__(self, params: Mapping[str, float], random: Random) -> None:
        super().__init__(params, random)
        self._now: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._best_size = self._size
        self._rest_s = 0.0
        self._unprobed_s = 0.0
        self._tried: tuple[int, dict[str, float]] | None = None
        """Size and latencies before the half of it was tried, while that is so."""

    def propose(self, observation: Observation) -> tuple[int, str]:
        size, tolerance = self._size, self.params["tolerance"]
        self._rest_s -= observation.seconds
        self._unprobed_s += observation.seconds
        what, ratio = self._slowest(observation)
        says = f"{what} takes {ratio:.1f} times its best"
        if observation.refusals and self._rest_s <= 0:
            self._rest_s = REST_S
            return min(size - 1, int(size * self.params["decrease"])), "the server turned requests away"
        if not observation.steps:
            return size, "nothing was answered lately"
        if self._rest_s > 0:
            return size, f"{says}; the last change has to show first"
        if self._tried is not None:
            return self._judge(*self._tried)
        if ratio > tolerance:
            self._rest(2)
            return min(size - 1, int(size * max(LEAST_LEFT, tolerance / ratio))), says
        if not self.is_full(observation):
            return size, "nothing waits for a slot"
        if self._unprobed_s > self.params["probe_s"] and self._best_size > size // 2 >= 1:
            return self._try_half("the best latency may be one of overload; half the size tells")
        if ratio <= GROW_BELOW * tolerance:
            self._rest(1)
            return size + max(1, math.isqrt(size)), f"work waits and {says}"
        return size, says

    def _try_half(self, reason: str) -> tuple[int, str]:
        self._tried = (self._size, dict(self._now))
        self._unprobed_s = 0.0
        self._rest(2)
        return self._size // 2, reason

    def _judge(self, size: int, before: Mapping[str, float]) -> tuple[int, str]:
        """What follows from having tried half of a size."""
        self._tried = None
        fallen = [what for what, latency in before.items() if self._now[what] < FALLEN * latency]
        if not fallen:
            self._rest(1)
            return size, "half the size did not lower latency"
        if self._size > 1:
            return self._try_half(f"{fallen[0]} comes sooner at half the size")
        return self._size, f"{fallen[0]} comes sooner at half the size"

    def _slowest(self, observation: Observation) -> tuple[str, float]:
        """Of the two latencies the one that has risen most, and how many times its best it is by now."""
        latencies = {"the first token": observation.first_token_s, "a token": observation.step_s}
        for what, latency in latencies.items():
            if not latency or not observation.steps:
                continue
            now = self._now[what] = WEIGHT * latency + (1 - WEIGHT) * self._now.get(what, latency)
            risen = self._best.get(what, now) * (1 + self.params["drift"] * observation.seconds)
            if now <= risen:
                self._best_size = self._size
            self._best[what] = min(now, risen)
        ratios = {what: now / self._best[what] for what, now in self._now.items()}
        return max(ratios.items(), key=lambda pair: pair[1], default=("a token", 1.0))

    def _rest(self, num_answers: int) -> None:
        self._rest_s = max(REST_S, num_answers * self._now.get("the first token", 0.0))
