"""The Redis that Django's settings name, for services, admin and periodic tasks."""

from functools import cache

import redis
from django.conf import settings
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from scheduling.keys import Keys
from scheduling.store import connect

TIMEOUT_S = 5.0
RETRIES = 2


def live_redis() -> redis.Redis:
    """This process's client (safe to share between threads). Gives up after a few seconds rather than hang a page."""
    return _client(settings.PENSTOCK.redis)


@cache
def _client(url: str) -> redis.Redis:
    retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES)
    return connect(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=retry)


def live_keys() -> Keys:
    """Key names under the configured prefix."""
    return Keys(prefix=settings.PENSTOCK.key_prefix)
