"""Whether the upstream serves, by what requests and probes found, and how many requests may be tried meanwhile."""

from collections.abc import Callable

PROBE_PERIOD_S = 5.0
PAUSES_S = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""After the first failure in a row, the second and so on; nothing is claimed meanwhile."""
UNASKED = "The upstream has not been asked yet."


class Health:
    """A breaker: after a failure nothing is claimed for a while, then a probe has to succeed, then one request alone.

    `clock` gives seconds. Belongs to the loop's thread.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_failures = 0
        self._until_s = 0.0
        self._probe_s = 0.0
        self._trial_s: float | None = None
        """Since when one request at a time has to prove that the upstream serves; None while that is not in doubt."""
        self.problem = UNASKED
        """A sentence; empty while the upstream serves."""

    @property
    def is_probe_due(self) -> bool:
        """Whether it is time to ask whether the upstream is there."""
        return self._clock() >= self._probe_s

    def note_failure(self, problem: str, *, pause_s: float = 0.0) -> None:
        """A request or a probe failed. Those that fail within a pause belong to the failure that began it."""
        now = self._clock()
        self.problem = problem
        if now < self._until_s:
            return
        self._num_failures += 1
        pause_s = max(pause_s, PAUSES_S[min(self._num_failures, len(PAUSES_S)) - 1])
        self._until_s = self._probe_s = self._trial_s = now + pause_s

    def note_probe(self) -> None:
        """A probe succeeded."""
        now = self._clock()
        if now < self._until_s:  # it was on its way when a request failed
            self._probe_s = self._until_s
            return
        self._probe_s = now + PROBE_PERIOD_S
        self.problem = ""

    def note_token(self, sent_s: float) -> None:
        """The first token of a request came that was sent then; it proves nothing where that was before a failure."""
        if self._trial_s is None or sent_s >= self._trial_s:
            self._num_failures, self._trial_s = 0, None

    def room(self, limit: int, sent_s: list[float]) -> int:
        """How many more requests may be claimed, where `limit` may be with the upstream and some were sent then."""
        if self.problem:
            return 0
        if self._trial_s is None:
            return max(0, limit - len(sent_s))
        is_tried = any(moment >= self._trial_s for moment in sent_s)
        return 0 if is_tried or len(sent_s) >= limit else 1
