"""One connection to Redis, for callers who send one call after the other."""

from collections.abc import Sequence
from typing import Any

import hiredis
import redis.asyncio
from redis.exceptions import ResponseError

Words = Sequence[Any]
"""A command as it goes over the wire."""


class Link:
    """Speaks over a connection of the client's, past the client itself.

    What that does around each call (taking the connection from a pool and putting it back, retries, metrics) costs
    about as much again as the call itself. A lost connection is opened anew by the next call.
    """

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._connection: redis.asyncio.Connection | None = None

    async def run(self, commands: Sequence[Words]) -> list[Any]:
        """Send commands together; the reply of each as the client gives it, or its ResponseError.

        Raises what a lost server shows as. Whoever gives up meanwhile loses the connection, with replies to come.
        """
        connection = self._connection
        if connection is None:
            connection = self._connection = await self._client.connection_pool.get_connection()
        elif connection.is_connected and await connection.can_read():  # the server has closed it
            await connection.disconnect()
        packed = [hiredis.pack_command(tuple(words)) for words in commands]
        await connection.send_packed_command(packed, check_health=False)
        return [await self._read(connection, words[0]) for words in commands]

    async def _read(self, connection: redis.asyncio.Connection, name: str) -> Any:
        try:
            reply = await connection.read_response()
        except ResponseError as error:
            return error
        read = self._client.response_callbacks.get(name)
        return reply if read is None else read(reply)
