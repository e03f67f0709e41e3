"""The answers of requests that have an idempotency key: a stream for each, read by every process whose clients wait."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import redis.asyncio

from inference.gateway.replies import Mailbox, StreamReader, read_updates
from inference.messages import SequenceUpdate


@dataclass(slots=True)
class Followed:
    """A stream, how far it was read, what it said, and who waits for it here."""

    last_id: bytes = b"0-0"
    updates: list[SequenceUpdate] = field(default_factory=list)
    """All of them, for whoever joins later; bounded by the answer's length."""
    waiters: dict[Mailbox, Callable[[], None]] = field(default_factory=dict)


class FollowedReplies(StreamReader):
    """Reads the streams from their beginning, and gives every mailbox that joined all of its answer.

    `wake_stream` is one of this process: an entry there ends a read that began before the last stream was joined.
    """

    def __init__(self, client: redis.asyncio.Redis, wake_stream: str, *, on_return: Callable[[], None]) -> None:
        super().__init__(client, on_return)
        self.wake_stream = wake_stream
        self._woken = b"0-0"
        self._followed: dict[str, Followed] = {}
        self._any = asyncio.Event()

    def join(self, stream: str, mailbox: Mailbox, on_gap: Callable[[], None]) -> bool:
        """Put what the stream has said and will say into a mailbox. True where the reader has to be woken for it."""
        followed = self._followed.get(stream)
        is_new = followed is None
        if followed is None:
            followed = self._followed[stream] = Followed()
            self._any.set()
        followed.waiters[mailbox] = on_gap
        now = asyncio.get_running_loop().time()
        for update in followed.updates:
            _deliver(update, mailbox, on_gap, now)
        return is_new

    def leave(self, stream: str, mailbox: Mailbox) -> None:
        """Forget a mailbox, and with the last one the stream."""
        followed = self._followed.get(stream)
        if followed is not None:
            followed.waiters.pop(mailbox, None)
            if not followed.waiters:
                del self._followed[stream]

    async def choose(self) -> dict[str, bytes]:
        if not self._followed:
            self._any.clear()
            await self._any.wait()
        return {self.wake_stream: self._woken} | {name: f.last_id for name, f in self._followed.items()}

    def num_waiting(self) -> int:
        return len(self._followed)

    def take(self, stream: str, after_id: bytes, last_id: bytes, messages: list[bytes]) -> None:
        if stream == self.wake_stream:
            self._woken = last_id
            return
        followed = self._followed.get(stream)
        if followed is None or followed.last_id != after_id:  # left, and joined again, during the read
            return
        followed.last_id = last_id
        now = asyncio.get_running_loop().time()
        for message in messages:
            for update in read_updates(message):
                followed.updates.append(update)
                for mailbox, on_gap in followed.waiters.items():
                    _deliver(update, mailbox, on_gap, now)


def _deliver(update: SequenceUpdate, mailbox: Mailbox, on_gap: Callable[[], None], now: float) -> None:
    if not mailbox.put(update, now):
        on_gap()
