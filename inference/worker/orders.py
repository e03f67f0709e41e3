"""What operators want of this replica, as the plan in Redis has it; a gpu worker looks once a second."""

import logging
from typing import Any

import msgspec
import redis

from inference.plan import PlannedReplica
from scheduling.keys import Keys

logger = logging.getLogger(__name__)

_decode = msgspec.json.Decoder(PlannedReplica).decode


class Orders:
    """Reads this replica's part of the plan."""

    def __init__(self, client: redis.Redis, keys: Keys, replica: str) -> None:
        self._client = client
        self._keys = keys
        self._replica = replica

    def read(self) -> PlannedReplica | None:
        """None where nothing was ever wanted of it, or Redis does not say: then what stands stands."""
        try:
            packed: Any = self._client.hget(self._keys.plan, self._replica)
            return None if packed is None else _decode(packed)
        except (redis.RedisError, msgspec.MsgspecError) as error:
            logger.debug("What is wanted of %s cannot be read: %s", self._replica, error)
            return None

    def drain_s(self, default: float) -> float:
        """How long what runs may finish now that the worker is told to end."""
        planned = self.read()
        if planned is None or planned.wanted != "stopped" or planned.drain_s is None:
            return default
        return planned.drain_s
