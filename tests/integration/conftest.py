"""Fixtures for tests with a database and Redis."""

import pytest
from pytest_django.fixtures import Settings

from controlplane.config import Config
from scheduling.keys import Keys


@pytest.fixture
def installation(settings: Settings, redis_url: str, keys: Keys) -> Config:
    """Django's settings name this test's Redis and key prefix, for services, admin and periodic tasks."""
    values = settings.PENSTOCK.model_dump() | {"redis_url": redis_url, "key_prefix": keys.prefix}
    config = Config.model_construct(**values)
    settings.PENSTOCK = config
    return config
