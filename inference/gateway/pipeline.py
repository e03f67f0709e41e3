"""Commands of concurrent requests share round trips to Redis (group commit)."""

import asyncio
import logging
from typing import Any, TypeVar

import redis.asyncio
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError

from inference.gateway.errors import RedisUnavailable
from inference.gateway.link import Link
from scheduling.store import Command

T = TypeVar("T")
log = logging.getLogger(__name__)

LOST = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError, OSError)
"""What a lost, just restarted or full server shows as; all of it passes."""
DISK_FULL = "MISCONF"
"""How the error begins of a server that refuses to write since its own file could not be written."""
MAX_BATCH = 512
TIMEOUT_S = 5.0
"""A server that is silent for this long counts as lost."""
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.5


class CommandPipeline:
    """Gathers commands while a round trip is under way and sends them together in the next one.

    One connection, one round trip at a time: under load batches grow by themselves, alone a command waits for nothing.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._link = Link(client)
        self._waiting: list[tuple[Command[Any], asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None
        self.connected = True
        """Whether the last round trip succeeded."""

    def send(self, command: Command[T]) -> "asyncio.Future[T]":
        """Run a command with the next batch. Raises RedisUnavailable where the server was lost meanwhile."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.append((command, future))
        if self._task is None:
            self._task = loop.create_task(self._drain())
        return future

    async def send_within(self, command: Command[T], wait_s: float) -> T:
        """`send`, again and again for at most `wait_s`, then RedisUnavailable. For commands that may run twice."""
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + wait_s, FIRST_PAUSE_S
        while True:
            try:
                return await self.send(command)
            except RedisUnavailable:
                if loop.time() + pause_s > deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    async def _drain(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                await self._flush(batch)
        finally:
            self._task = None

    async def _flush(self, batch: list[tuple[Command[Any], asyncio.Future[Any]]]) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                replies = await self._execute([command for command, _ in batch])
        except LOST as error:
            self._note(connected=False)
            replies = [RedisUnavailable(retry_after_s=1.0) for _ in batch]
            log.debug("Redis is away: %s", error)
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(RedisUnavailable() if isinstance(error, asyncio.CancelledError) else error)
            raise
        else:
            self._note(connected=True)
        for (command, future), reply in zip(batch, replies, strict=True):
            _resolve(command, future, reply)

    def _note(self, *, connected: bool) -> None:
        if connected != self.connected:
            self.connected = connected
            log.warning("Redis is back" if connected else "Redis is away; waiting for it")

    async def _execute(self, commands: list[Command[Any]]) -> list[Any]:
        """One round trip; one more for the commands whose script the server did not know."""
        replies = await self._link.run([command.words() for command in commands])
        missed = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missed:
            for source in {script.source for i in missed if (script := commands[i].script)}:
                await self._client.script_load(source)
            again = await self._link.run([commands[i].words() for i in missed])
            for i, reply in zip(missed, again, strict=True):
                replies[i] = reply
        return replies


def _resolve(command: Command[Any], future: asyncio.Future[Any], reply: Any) -> None:
    """Answer one waiter. A reply that cannot be read fails its own command, not the batch."""
    if future.done():
        return
    if isinstance(reply, Exception):
        passes = isinstance(reply, LOST) or str(reply).startswith(DISK_FULL)
        future.set_exception(RedisUnavailable() if passes else reply)
        return
    try:
        future.set_result(command.read(reply))
    except Exception as error:
        future.set_exception(error)


def ignore_lost(future: asyncio.Future[Any]) -> None:
    """What Redis did not take while nobody waits for it is not worth an error."""
    error = None if future.cancelled() else future.exception()
    if error is not None and not isinstance(error, RedisUnavailable):
        log.error("Redis refused a command: %s", error)
