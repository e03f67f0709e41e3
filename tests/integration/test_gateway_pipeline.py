"""What a web process makes of a Redis that answers, but not as it should."""

import pytest
import redis.asyncio

from inference.gateway.errors import RedisUnavailable
from inference.gateway.pipeline import CommandPipeline
from scheduling.store import Command

FULL = "MISCONF Errors writing to the AOF file: No space left on device"


def failing(error: str) -> Command[bytes]:
    """A command that this very Redis refuses with an error of ours."""
    return Command(("EVAL", f"return redis.error_reply('{error}')", 0), bytes)


@pytest.mark.parametrize("num_others", [0, 3])
async def test_a_redis_whose_disk_is_full_counts_as_away(astore: redis.asyncio.Redis, num_others: int) -> None:
    pipeline = CommandPipeline(astore)
    others = [pipeline.send(Command(("PING",), bool)) for _ in range(num_others)]
    with pytest.raises(RedisUnavailable):
        await pipeline.send(failing(FULL))
    assert [await other for other in others] == [True] * num_others


async def test_an_error_of_our_own_is_told_as_it_is(astore: redis.asyncio.Redis) -> None:
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        await CommandPipeline(astore).send(failing("WRONGTYPE of key"))
