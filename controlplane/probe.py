"""Whether the gpu worker of this container reports: `python -m controlplane.probe`, exit status 0 or 1.

It asks Redis alone, and says yes where that is away: to start a worker again would mend nothing.
"""

import sys

import redis

from controlplane.config import Config, load_config
from scheduling.keys import Keys
from scheduling.store import connect

PATIENCE_S = 3.0


def probe(config: Config) -> str:
    """Why the worker counts as dead; empty where it lives. One that waits for a lost GPU lives: it says so itself."""
    client = connect(config.redis, socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S)
    try:
        reports = client.exists(Keys(config.key_prefix).replica(config.replica))
        deployed = client.exists(Keys(config.key_prefix).deployments)
    except (redis.RedisError, OSError):
        return ""
    return f"{config.replica} does not report." if deployed and not reports else ""


if __name__ == "__main__":
    sys.exit(probe(load_config()) or 0)
