"""Fixtures for tests with a database, Redis, engine processes and a stack of web processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from django.db import connection
from pytest_django.fixtures import Settings
from pytest_django.plugin import DjangoDbBlocker

from benchmarks.stack import Stack
from controlplane.config import Config
from scheduling.keys import Keys
from tests.integration.engines import Engines, make_tiny_checkpoint
from tests.integration.fleet import FleetClient
from tests.integration.gateway_support import Api


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> None:
    """The audit trail keeps its rows. SQLite is emptied between tests by DELETE, so there that trigger has to go."""
    with django_db_blocker.unblock():
        if connection.vendor == "sqlite":
            with connection.cursor() as cursor:
                cursor.execute("DROP TRIGGER scheduling_operatoraction_undeleted")


@pytest.fixture
def installation(settings: Settings, redis_url: str, keys: Keys) -> Config:
    """Django's settings name this test's Redis and key prefix, for services, admin and periodic tasks."""
    values = settings.PENSTOCK.model_dump() | {"redis_url": redis_url, "key_prefix": keys.prefix}
    config = Config.model_construct(**values)
    settings.PENSTOCK = config
    return config


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with context for 256 tokens."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with context for 4096 tokens: more than an engine makes before a test has done what it does."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama_long")


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys) -> FleetClient:
    """A web process's end of the queue that `engines` serve."""
    return FleetClient(store, keys, Engines.model)


@pytest.fixture
def engines(checkpoint: Path, redis_url: str, keys: Keys) -> Iterator[Engines]:
    """Starts engine processes of `checkpoint`; none is left."""
    with Engines(checkpoint, redis_url, keys) as engines:
        yield engines


@pytest.fixture
def api(stack: Stack) -> Api:
    """HTTP to the web process of the module's `stack`."""
    return Api(stack)


@pytest.fixture
def live(stack: Stack) -> Iterator[redis.Redis]:
    """A client of the stack's Redis."""
    with redis.Redis.from_url(stack.redis.url) as client:
        yield client
