"""Everything that other threads have to tell the loop, read between two steps."""

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inference.worker.spec import ControlMessage


@dataclass(frozen=True, slots=True)
class Told:
    """A command, and when it was read (monotonic seconds)."""

    message: ControlMessage
    read_s: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Requests to end: their clients want them no more."""

    request_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Lost:
    """Requests to forget, each with the attempt that is no longer held: another has been, or will be, claimed."""

    attempts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease of this owner ran out, and its requests went back to the queue."""

    owner: str


Word = Told | Cancelled | Lost | LeaseLost


class Inbox:
    """Brings the loop words, and ends its wait. All but `read` may be called by any thread and by signal handlers."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Word | None] = queue.SimpleQueue()

    def tell(self, message: ControlMessage) -> None:
        """Leave a command."""
        self._queue.put(Told(message, time.monotonic()))

    def put(self, word: Word) -> None:
        """Leave a word."""
        self._queue.put(word)

    def wake(self) -> None:
        """End the loop's wait without a word."""
        self._queue.put(None)

    def read(self, timeout_s: float = 0.0) -> list[Word]:
        """What was left since the last call, in order. Waits up to `timeout_s` for a word or a wake."""
        words = []
        try:
            word = self._queue.get(block=timeout_s > 0, timeout=timeout_s)
            while True:
                if word is not None:
                    words.append(word)
                word = self._queue.get_nowait()
        except queue.Empty:
            return words
