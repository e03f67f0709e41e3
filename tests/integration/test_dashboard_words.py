"""A web process hears workers' words while somebody watches, and leaves none behind in Redis when nobody does."""

from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from dashboard.aggregator import Aggregator
from dashboard.document import DocumentBuilder
from dashboard.readings import FleetReader
from dashboard.selectors.activity import Activity
from scheduling.keys import Keys
from tests.patience import until


async def read_nothing() -> Activity:
    return Activity()


@pytest.fixture
async def aggregator(astore: redis.asyncio.Redis, keys: Keys) -> AsyncIterator[Aggregator]:
    reader = FleetReader(astore, keys)
    made = Aggregator(reader=reader, builder=DocumentBuilder(queue_limit=20), read_activity=read_nothing)
    yield made
    await made.stop()


async def test_words_are_heard_only_while_somebody_watches(
    aggregator: Aggregator, astore: redis.asyncio.Redis, keys: Keys
) -> None:
    async def num_heard_by(wanted: int) -> bool:
        [(_, num)] = await astore.pubsub_numsub(keys.told)
        return bool(num == wanted)

    for _ in range(2):
        subscription = aggregator.subscribe()
        await until(lambda: num_heard_by(1))
        aggregator.unsubscribe(subscription)
        await until(lambda: num_heard_by(0))
