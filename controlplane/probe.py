"""Whether this container's gpu or ops worker is at work: `python -m controlplane.probe [ops]`, exit status 0 or 1.

It asks Redis alone, and says yes where that is away: to start a worker again would mend nothing.
"""

import sys
from collections.abc import Callable, Mapping

import redis

from controlplane.config import Config, load_config
from scheduling.keys import Keys
from scheduling.store import connect

PATIENCE_S = 3.0


def probe(config: Config, kind: str = "gpu") -> str:
    """Why the worker counts as dead; empty where it lives."""
    client = connect(config.redis, socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S)
    try:
        return PROBES[kind](client, Keys(config.key_prefix), config)
    except (redis.RedisError, OSError):
        return ""


def _probe_gpu(client: redis.Redis, keys: Keys, config: Config) -> str:
    """One that waits for a lost GPU lives: it says so itself. Before a model is offered there is nothing to say."""
    reports, deployed = client.exists(keys.replica(config.replica)), client.exists(keys.deployments)
    return f"{config.replica} does not report." if deployed and not reports else ""


def _probe_ops(client: redis.Redis, keys: Keys, config: Config) -> str:
    """Its sign of life is a periodic task's: beat sends, the broker delivers, and a thread is free for it."""
    return "" if client.exists(keys.ops) else "The ops worker has run no periodic task for a while."


PROBES: Mapping[str, Callable[[redis.Redis, Keys, Config], str]] = {"gpu": _probe_gpu, "ops": _probe_ops}


if __name__ == "__main__":
    sys.exit(probe(load_config(), *sys.argv[1:2]) or 0)
