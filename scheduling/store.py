"""Redis behind pure commands: a call is described once, then run by a sync client, an asyncio client or a pipeline."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import hiredis
import redis
import redis.asyncio
from redis.exceptions import NoScriptError

T = TypeVar("T")
LUA = Path(__file__).parent / "lua"
OF_TENANTS = ("acquire", "settle", "usage")
"""Scripts on a tenant's limits. They go without what queues share: every call runs all of its script."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its SHA-1."""

    source: str
    sha: str


@cache
def load_script(name: str) -> Script:
    """Read `scheduling/lua/<name>.lua`, behind the shared `prelude.lua` and, for scripts of a queue, `queue.lua`."""
    parts = ("prelude", name) if name in OF_TENANTS else ("prelude", "queue", name)
    source = "".join((LUA / f"{part}.lua").read_text() for part in parts)
    return Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Command(Generic[T]):
    """A call to Redis and how to read its reply.

    With `script`, `args` are the keys and arguments of EVALSHA, the first `num_keys` of them keys; without, a
    plain command.
    """

    args: Sequence[Any]
    read: Callable[[Any], T]
    script: Script | None = None
    num_keys: int = 0

    def words(self) -> tuple[Any, ...]:
        """The command as it goes over the wire."""
        if self.script is None:
            return tuple(self.args)
        return ("EVALSHA", self.script.sha, self.num_keys, *self.args)


def _read_time(reply: Any) -> float:
    seconds, microseconds = reply
    return int(seconds) + int(microseconds) / 1e6


TIME: Command[float] = Command(("TIME",), _read_time)
"""Unix seconds by the server's clock: the only one that processes on several machines share."""


def connect(url: str, **options: Any) -> redis.Redis:
    """A sync client; replies stay bytes."""
    return redis.Redis.from_url(url, **options)


def aconnect(url: str, **options: Any) -> redis.asyncio.Redis:
    """An asyncio client; replies stay bytes."""
    return redis.asyncio.Redis.from_url(url, **options)


def execute(client: redis.Redis, command: Command[T]) -> T:
    """Run one command. Loads the script where the server does not know it yet (after a restart, say)."""
    try:
        return command.read(client.execute_command(*command.words()))
    except NoScriptError:
        assert command.script is not None
        client.script_load(command.script.source)
        return command.read(client.execute_command(*command.words()))


class Sent(Generic[T]):
    """A command on its way: the server computes it while the caller does something else. Leave the context to give up.

    Only for commands that may be repeated: where the reply is lost, `result` runs the command again.
    """

    def __init__(self, client: redis.Redis, command: Command[T]) -> None:
        self._client = client
        self._command = command
        self._connection: redis.Connection | None = client.connection_pool.get_connection()
        try:
            self._connection.send_command(*command.words())
        except redis.ConnectionError:
            self._let_go()

    def result(self) -> T:
        """Wait for the reply. Raises what `execute` raises."""
        if self._connection is not None:
            try:
                reply = self._connection.read_response()
            except NoScriptError:
                pass
            except (redis.ConnectionError, redis.TimeoutError):
                self._let_go()
            else:
                self._client.connection_pool.release(self._connection)
                self._connection = None
                return self._command.read(reply)
        return execute(self._client, self._command)

    def __enter__(self) -> "Sent[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Close a connection that may have a reply nobody has read."""
        if self._connection is not None:
            self._connection.disconnect()
            self._client.connection_pool.release(self._connection)
            self._connection = None


async def aexecute(client: redis.asyncio.Redis, command: Command[T]) -> T:
    """`execute` for asyncio."""
    try:
        return command.read(await client.execute_command(*command.words()))
    except NoScriptError:
        assert command.script is not None
        await client.script_load(command.script.source)
        return command.read(await client.execute_command(*command.words()))


def load_scripts(client: redis.Redis, names: Sequence[str]) -> None:
    """Make scripts known to the server before they are needed, in one round trip."""
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.script_load(load_script(name).source)
        pipe.execute()


def execute_many(client: redis.Redis, commands: Sequence[Command[Any]]) -> list[Any]:
    """Run commands in one round trip, in order, not as a transaction. Raises the first error after all were tried.

    A script the server does not know is loaded and only the commands that missed it are run again.
    """
    replies = _pipeline(client, commands)
    missed = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if missed:
        for source in {c.script.source for c in (commands[i] for i in missed) if c.script}:
            client.script_load(source)
        for i, reply in zip(missed, _pipeline(client, [commands[i] for i in missed]), strict=True):
            replies[i] = reply
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return [c.read(reply) for c, reply in zip(commands, replies, strict=True)]


def _pipeline(client: redis.Redis, commands: Sequence[Command[Any]]) -> list[Any]:
    """Replies as the client gives them, or ResponseErrors. The client's own pipeline takes longer."""
    if not commands:
        return []
    pool, read = client.connection_pool, client.response_callbacks
    words = [command.words() for command in commands]
    packed = [b"".join(map(hiredis.pack_command, words))]
    connection = pool.get_connection()

    def round_trip() -> list[Any]:
        connection.send_packed_command(packed)
        return [_read_reply(connection) for _ in words]

    try:
        replies = connection.retry.call_with_retry(round_trip, lambda error: connection.disconnect())
    finally:
        pool.release(connection)
    return [
        reply if isinstance(reply, Exception) or word[0] not in read else read[word[0]](reply)
        for word, reply in zip(words, replies, strict=True)
    ]


def _read_reply(connection: redis.Connection) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error
