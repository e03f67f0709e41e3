"""How fast a queue drains, judged by readings of it: for backpressure, estimates of waits, and the simulator."""

from scheduling.core.answers import QueueSnapshot
from scheduling.core.backpressure import DrainRate

EVIDENCE_S = 1.0
"""A rate seen for less than this is no measure: what two looks happen to find says little."""
UNSERVED_S = 15.0
"""Once nobody has served for so long, nothing is known of how fast what waits will drain."""


class BacklogRate:
    """How fast the queue drains while something waits.

    Idle time must not count: a fleet that had nothing to do for a minute would look slow, and the first burst after it
    would be refused. So only intervals that begin and end with a backlog are fed to the average, and none without a
    replica: what waits for a worker that restarts is no measure of how fast it will work.
    """

    def __init__(self) -> None:
        self.rate = DrainRate()
        self._last: tuple[float, QueueSnapshot] | None = None
        self._served_s: float | None = None
        self._unserved_s = 0.0
        self._busy_s = 0.0
        self._requests = 0
        self._tokens = 0

    def observe(self, snapshot: QueueSnapshot, now: float, *, serving: bool = True) -> None:
        """Take a reading; `now` in seconds of any steady clock. `serving`: whether a replica is there."""
        if serving or self._served_s is None:
            self._served_s = now
        self._unserved_s = now - self._served_s
        last, self._last = self._last, (now, snapshot) if serving else None
        if last is None or not (last[1].depth and snapshot.depth) or snapshot.claimed_total < last[1].claimed_total:
            return
        if not self._busy_s:
            self.rate.update(0.0, 0, 0)
        self._busy_s += now - last[0]
        self._requests += snapshot.claimed_total - last[1].claimed_total
        self._tokens += max(0, snapshot.claimed_tokens_total - last[1].claimed_tokens_total)
        self.rate.update(self._busy_s, self._requests, self._tokens)

    def wait_s(self, waiting_tokens: float) -> float | None:
        """Seconds until that much has drained; None while nothing drains, or too little is known of how fast."""
        if waiting_tokens > 0 and (self._busy_s < EVIDENCE_S or self._unserved_s > UNSERVED_S):
            return None
        return self.rate.wait_s(waiting_tokens)
