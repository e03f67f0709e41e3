"""Whether an engine process takes requests, and how it stops: the states an operator moves it through."""

from collections.abc import Callable

from inference.messages import ReplicaState


class Gate:
    """`ready` claims; `paused` and `draining` finish what they have; a drained engine is `stopped` until resumed.

    `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline_s = 0.0
        self._ends = False
        self.state: ReplicaState = "ready"

    @property
    def is_open(self) -> bool:
        """Whether requests may be claimed."""
        return self.state == "ready"

    @property
    def is_over(self) -> bool:
        """Whether the loop should return."""
        return self._ends and self.state == "stopped"

    def pause(self) -> None:
        """Claim nothing; what runs goes on."""
        if not self._ends:
            self.state = "paused"

    def resume(self) -> None:
        """Claim again. An engine that was told to end does not."""
        if not self._ends:
            self.state = "ready"

    def drain(self, drain_s: float) -> None:
        """Claim nothing; after `drain_s` give back what still runs."""
        self.state = "draining"
        self._deadline_s = self._clock() + drain_s

    def end(self, drain_s: float) -> None:
        """Drain, then return from the loop. A second call may shorten the drain."""
        self._ends = True
        self.drain(drain_s)

    @property
    def time_is_up(self) -> bool:
        """Whether a drain has used up its time."""
        return self.state == "draining" and self._clock() >= self._deadline_s

    @property
    def must_leave(self) -> bool:
        """Whether the process should end, and has used up the time for it."""
        return self._ends and self.time_is_up

    def emptied(self, *, is_delivered: bool) -> None:
        """Nothing runs any more. A process that ends delivers the rest when its loop has returned."""
        if self.state == "draining" and (is_delivered or self._ends):
            self.state = "stopped"
