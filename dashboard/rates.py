"""Events a second over the last few seconds, from a counter that only grows."""

from collections import deque


class RateMeter:
    """Differences a cumulative counter over a sliding window."""

    def __init__(self, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, int]] = deque()

    def observe(self, now_s: float, total: int) -> None:
        """Take a reading. A counter that went backwards (its store lost its data) starts afresh."""
        if self._samples and total < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now_s, total))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - self._window_s:
            self._samples.popleft()

    @property
    def per_s(self) -> float:
        """Events a second; 0 before the second reading."""
        if len(self._samples) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0
