"""One look at the fleet as it is wanted and as it is; see `fleet_view`."""

import time
from typing import Any

import msgspec
import redis

from inference.fleet_view import FleetView, view_fleet
from inference.messages import DeploymentSpec
from inference.replicas import read_machines, read_plan
from inference.services import read_replicas
from scheduling.keys import Keys


def read_fleet(client: redis.Redis, keys: Keys) -> FleetView:
    """Raises redis.RedisError or OSError where Redis does not answer."""
    packed: Any = client.hgetall(keys.deployments)
    specs = {spec.name: spec for value in packed.values() if (spec := _decode_spec(value)) is not None}
    return view_fleet(
        read_plan(client, keys), read_machines(client, keys), read_replicas(client, keys), specs, now_s=time.time()
    )


def _decode_spec(packed: bytes) -> DeploymentSpec | None:
    """None for one of another version."""
    try:
        return msgspec.json.decode(packed, type=DeploymentSpec)
    except msgspec.MsgspecError:
        return None
