"""One look at Redis: what is deployed, what waits, and what every replica says of itself."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import redis.asyncio
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from inference.gateway.monitor import read_level
from inference.messages import DeploymentSpec, ReplicaStatus
from inference.plan import MACHINE_KEEP_S, Machine, Plan, decode_machines, decode_plan
from scheduling.core.answers import QueueSnapshot
from scheduling.core.backpressure import Assessment
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.store import Command, aexecute

FORGET_AFTER_S = 600.0
"""A replica that fell silent without a good-bye is shown as lost for this long."""
GONE = ("stopped",)
"""States after which silence is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The fleet at one moment. `lost` holds the last words of replicas whose status ran out."""

    time_s: float
    deployments: Mapping[str, DeploymentSpec] = field(default_factory=dict)
    snapshots: Mapping[str, QueueSnapshot] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaStatus] = field(default_factory=dict)
    lost: Mapping[str, ReplicaStatus] = field(default_factory=dict)
    levels: Mapping[str, Assessment] = field(default_factory=dict)
    """Backpressure as the web processes agree on it."""
    plan: Plan = field(default_factory=Plan)
    machines: Mapping[str, Machine] = field(default_factory=dict)


class FleetReader:
    """Reads Redis, and remembers replicas that were there a while ago."""

    def __init__(self, client: redis.asyncio.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._words: PubSub | None = None
        self._known: dict[str, tuple[float, ReplicaStatus]] = {}
        self._decode_status = msgspec.msgpack.Decoder(ReplicaStatus).decode
        self._decode_spec = msgspec.json.Decoder(DeploymentSpec).decode

    async def read(self, now_s: float) -> Reading:
        """Two round trips. Raises redis.RedisError or OSError where the server is away."""
        raw_specs, raw_names, raw_levels, raw_plan, raw_machines = await asyncio.gather(
            self._ask("HGETALL", self._keys.deployments),
            self._ask("ZRANGE", self._keys.replicas, 0, -1),
            self._ask("HGETALL", self._keys.backpressure),
            self._ask("HGETALL", self._keys.plan),
            self._ask("ZRANGEBYSCORE", self._keys.machines, now_s - MACHINE_KEEP_S, "+inf"),
        )
        deployments = self._deployments(raw_specs)
        queues = [FleetQueue(self._keys, model) for model in deployments]
        statuses, machines, snapshots = await asyncio.gather(
            self._statuses([name.decode() for name in raw_names]),
            self._machines([name.decode() for name in raw_machines]),
            asyncio.gather(*(aexecute(self._client, queue.snapshot()) for queue in queues)),
        )
        plan = self._plan(raw_plan)
        self._remember(now_s, statuses, plan)
        return Reading(
            time_s=now_s,
            deployments=deployments,
            snapshots=dict(zip(deployments, snapshots, strict=True)),
            replicas=statuses,
            lost={name: status for name, (_, status) in self._known.items() if name not in statuses},
            levels={
                name.decode(): standing.assessment
                for name, raw in raw_levels.items()
                if (standing := read_level(raw)) is not None
            },
            plan=plan,
            machines=machines,
        )

    async def await_word(self, timeout_s: float) -> None:
        """Until a worker says that it has told something new, or the time is over. Never raises RedisError."""
        try:
            if self._words is None:
                self._words = self._client.pubsub(ignore_subscribe_messages=True)
                await self._words.subscribe(self._keys.told)
            end_s = time.monotonic() + timeout_s
            while (left_s := end_s - time.monotonic()) > 0:
                if await self._words.get_message(timeout=left_s) is not None:
                    while await self._words.get_message(timeout=0) is not None:
                        pass  # one look answers all of them
                    return
        except (RedisError, OSError):  # what reads the fleet says so
            await self.close()
            await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        """Hear no more words."""
        words, self._words = self._words, None
        if words is not None:
            with suppress(RedisError, OSError):
                await words.aclose()

    async def _ask(self, *words: Any) -> Any:
        return await aexecute(self._client, Command(words, lambda reply: reply))

    def _deployments(self, raw: Mapping[bytes, bytes]) -> dict[str, DeploymentSpec]:
        specs = {}
        for name, value in sorted(raw.items()):
            try:
                specs[name.decode()] = self._decode_spec(value)
            except msgspec.MsgspecError:  # of another version; the gpu workers report it
                continue
        return specs

    async def _statuses(self, names: list[str]) -> dict[str, ReplicaStatus]:
        if not names:
            return {}
        found: dict[str, ReplicaStatus] = {}
        replies = await self._ask("MGET", *map(self._keys.replica, names))
        for name, raw in zip(names, replies, strict=True):
            try:
                if raw is not None:
                    found[name] = self._decode_status(raw)
            except msgspec.MsgspecError:
                continue
        return found

    async def _machines(self, names: list[str]) -> dict[str, Machine]:
        return decode_machines(await self._ask("MGET", *map(self._keys.machine, names))) if names else {}

    def _plan(self, raw: Mapping[bytes, bytes]) -> Plan:
        """What operators want; nothing for a moment where Redis lost it."""
        try:
            return decode_plan(raw) or Plan()
        except msgspec.MsgspecError:  # of another version; the machines report it
            return Plan()

    def _remember(self, now_s: float, statuses: Mapping[str, ReplicaStatus], plan: Plan) -> None:
        self._known.update({name: (now_s, status) for name, status in statuses.items()})
        for name, (heard_s, status) in list(self._known.items()):
            planned = plan.replicas.get(name)
            is_gone = status.state in GONE or (planned is not None and planned.wanted == "stopped")
            if name not in statuses and (is_gone or now_s - heard_s > FORGET_AFTER_S):
                del self._known[name]
