"""The answers of running requests: one stream reader per web process and a mailbox per request."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec
import redis
import redis.asyncio

from inference.gateway.errors import GatewayError
from inference.gateway.link import Link
from inference.gateway.pipeline import FIRST_PAUSE_S, LONGEST_PAUSE_S, LOST
from inference.messages import Finish, SequenceUpdate
from scheduling.core.sequence import TokenLogprob

log = logging.getLogger(__name__)
BLOCK_MS = 2000
SILENT_S = 15.0
"""A server that does not even answer that nothing came counts as lost."""
MAX_MESSAGES = 1000
GATHER_S = 0.001
"""While answers are under way, updates are taken at most this often, so that fast steps share a read and a write to
their client. An update waits only where another one came just before it."""
CROWD = 16
CROWD_GATHER_S = 0.004
"""The same with a crowd of requests. A write to a client costs more than all else that is done for a token."""


class Mailbox:
    """What has arrived for one request and its client has not taken yet.

    A client that is slower than its tokens finds several of them together, so memory is bounded by `max_tokens`.
    """

    __slots__ = (
        "_logprobs",
        "_texts",
        "_waiter",
        "attempt",
        "error",
        "finish",
        "heard_s",
        "idle",
        "num_tokens",
        "repairing",
        "shown_s",
        "whole",
    )

    def __init__(self, now: float) -> None:
        self.num_tokens = 0
        """How many tokens have arrived, each once; the number of the next one."""
        self.attempt = 0
        self.finish: Finish | None = None
        self.error: GatewayError | None = None
        self.idle = False
        """Set by the ticker where nothing came for a while; the client is sent a sign of life."""
        self.heard_s = now
        """When an update came, by the loop's clock."""
        self.shown_s = now
        """When the client was last sent something."""
        self.repairing = False
        self.whole = False
        """Nobody looks before the end."""
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, update: SequenceUpdate, now: float) -> bool:
        """Take an update, dropping the tokens that are here already. False where tokens before it are missing."""
        if self.finish is not None or update.attempt < self.attempt:
            return True
        texts = update.texts
        if update.start == self.num_tokens:  # nearly always: what comes next
            self._texts += texts
            self.num_tokens += len(texts)
            if update.logprobs:
                self._logprobs += update.logprobs
        elif (skip := self.num_tokens - update.start) < 0:
            return False
        elif skip < len(texts):
            self._texts += texts[skip:]
            self._logprobs += update.logprobs[skip:]
            self.num_tokens += len(texts) - skip
        self.attempt = update.attempt
        self.heard_s = now
        if update.finish is not None:
            self._texts.append(update.finish.text)
            self.finish = update.finish
            self.wake()
        elif self._waiter is not None and not self.whole:
            self.wake()
        return True

    def fail(self, error: GatewayError) -> None:
        """End the answer with an error, unless it has ended."""
        if self.finish is None and self.error is None:
            self.error = error
            self.wake()

    def wake(self) -> None:
        """Let the client's coroutine look again."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until there is an end, an error, or (unless `whole`) text or a sign of life to send."""
        while not (self.finish or self.error or (not self.whole and (self._texts or self.idle))):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def take(self, now: float) -> str:
        """The text since the last call, which the client is now sent."""
        self.idle = False
        self.shown_s = now
        texts = self._texts
        if not texts:
            return ""
        self._texts = []
        return texts[0] if len(texts) == 1 else "".join(texts)

    def take_logprobs(self) -> list[TokenLogprob]:
        """Those of the tokens since the last call, where the request asked for them."""
        taken, self._logprobs = self._logprobs, []
        return taken


class StreamReader(ABC):
    """Reads streams of updates for as long as the process lives; subclasses say which, and take what comes.

    `on_return()` is called after the server was away.
    """

    def __init__(self, client: redis.asyncio.Redis, on_return: Callable[[], None]) -> None:
        self._link = Link(client)
        self._on_return = on_return

    @abstractmethod
    async def choose(self) -> dict[str, bytes]:
        """The streams to read now, each with the id after which to go on."""

    @abstractmethod
    def take(self, stream: str, after_id: bytes, last_id: bytes, messages: list[bytes]) -> None:
        """Take messages (MessagePack lists of SequenceUpdate) that came after one id and end with another."""

    @abstractmethod
    def num_waiting(self) -> int:
        """Requests that are waited for."""

    async def run(self) -> None:
        """Read for ever."""
        pause_s = 0.0
        while True:
            streams = await self.choose()
            words = ("XREAD", "COUNT", MAX_MESSAGES, "BLOCK", BLOCK_MS, "STREAMS", *streams, *streams.values())
            try:
                async with asyncio.timeout(SILENT_S):
                    [reply] = await self._link.run([words])
                if isinstance(reply, redis.ResponseError):
                    raise reply
            except (redis.RedisError, OSError) as error:
                if not isinstance(error, LOST):
                    log.error("A reply stream cannot be read: %s", error)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2 or FIRST_PAUSE_S)
                await asyncio.sleep(pause_s)
                continue
            if pause_s:
                pause_s = 0.0
                self._on_return()
            for stream, entries in reply or ():
                try:
                    name = stream.decode()
                    self.take(name, streams[name], entries[-1][0], [fields[1] for _, fields in entries])
                except Exception:  # what is lost by it is found missing and read from the journal
                    log.exception("Updates could not be delivered")
            if reply:
                await self._pause()

    async def _pause(self) -> None:
        """Let those who were woken write to their clients, and while more is to come, let some of it gather."""
        await asyncio.sleep(0)
        if num_waiting := self.num_waiting():
            await asyncio.sleep(CROWD_GATHER_S if num_waiting >= CROWD else GATHER_S)


class ReplyReader(StreamReader):
    """Reads this process's reply stream and sorts the updates into mailboxes.

    `on_gap(request_id)` is called where tokens are missing: the stream was trimmed, or lost with the server's data.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        stream: str,
        *,
        on_gap: Callable[[str], None],
        on_return: Callable[[], None],
    ) -> None:
        super().__init__(client, on_return)
        self._position = {stream: b"0-0"}
        self._on_gap = on_gap
        self.mailboxes: dict[str, Mailbox] = {}

    async def choose(self) -> dict[str, bytes]:
        return self._position

    def take(self, stream: str, after_id: bytes, last_id: bytes, messages: list[bytes]) -> None:
        self._position[stream] = last_id
        self.deliver(messages)

    def num_waiting(self) -> int:
        return len(self.mailboxes)

    def deliver(self, messages: list[bytes]) -> None:
        """Sort messages into the mailboxes; unknown requests are ignored."""
        now = asyncio.get_running_loop().time()
        mailboxes = self.mailboxes
        for message in messages:
            for update in read_updates(message):
                mailbox = mailboxes.get(update.request_id)
                if mailbox is not None and not mailbox.put(update, now):
                    self._on_gap(update.request_id)


def read_updates(message: bytes) -> list[SequenceUpdate]:
    """A message of a reply stream; nothing, with a line of log, where it cannot be read."""
    try:
        return _decode(message)
    except msgspec.MsgspecError:
        log.exception("A message of the reply stream cannot be read")
        return []


_decode = msgspec.msgpack.Decoder(list[SequenceUpdate]).decode
