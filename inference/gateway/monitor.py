"""What a web process knows of each fleet queue and its replicas, read from Redis four times a second."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from inference.gateway.pipeline import CommandPipeline, ignore_lost
from inference.gateway.served import ServedModel
from inference.messages import ReplicaStatus, SharedLevel
from scheduling.core.answers import QueueSnapshot
from scheduling.core.backpressure import (
    CALM,
    Assessment,
    BackpressureLimits,
    DrainRate,
    Level,
    Standing,
    assess,
    settle,
)
from scheduling.core.drain import BacklogRate
from scheduling.core.policies import Policy, build_policy
from scheduling.keys import Keys
from scheduling.store import Command

log = logging.getLogger(__name__)
PERIOD_S = 0.25
LEVEL_LIFE_S = 5.0
"""A level that nobody has written again for this long is forgotten."""
DEAD_AFTER_S = 15.0
"""A replica not heard of for this long is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetStatus:
    """One model's queue and replicas at one moment."""

    time_s: float
    snapshot: QueueSnapshot | None = None
    replicas: Sequence[ReplicaStatus] = ()
    assessment: Assessment = field(default_factory=lambda: Assessment(Level.NONE, ""))
    estimated_wait_s: float | None = None
    """For a request that joins the end of the queue now; None where nothing drains it, or it is not known how fast."""
    rate: DrainRate = field(default_factory=DrainRate)
    """How fast the queue drains while something waits."""
    unserved_s: float = 0.0
    """For how long no replica of the model has reported; 0 while one does."""

    @property
    def kv_usage(self) -> float:
        """Used part of the KV cache of all live replicas, 0 to 1."""
        total = sum(r.kv_blocks_total for r in self.replicas)
        return sum(r.kv_blocks_used for r in self.replicas) / total if total else 0.0


class FleetMonitor:
    """Keeps a FleetStatus and the active policy per model."""

    def __init__(self, pipeline: CommandPipeline, keys: Keys, queue_limit: int, limits: BackpressureLimits) -> None:
        self._pipeline = pipeline
        self._keys = keys
        self._queue_limit = queue_limit
        self._limits = limits
        self._lowered = limits.lowered()
        self._started_s = self._looked_s = time.monotonic()
        self._served_s: dict[str, float] = {}
        """Model -> when a replica of it was last seen (monotonic)."""
        self._backlogs: dict[str, BacklogRate] = {}
        self._status: dict[str, FleetStatus] = {}
        self._policies: dict[str, tuple[int, Policy]] = {}
        self._decode = msgspec.msgpack.Decoder(ReplicaStatus).decode

    def status(self, model: str) -> FleetStatus:
        """The last reading; an empty one before the first."""
        return self._status.get(model) or FleetStatus(time_s=0.0)

    async def active_policy(self, model: ServedModel, *, fresh: bool = False) -> tuple[int, Policy]:
        """Revision and policy to place a request by; `fresh` asks Redis instead of taking what the last tick saw."""
        known = self._policies.get(model.name)
        if known is None or fresh:
            active = await self._pipeline.send(model.queue.active_policy())
            known = self._keep_policy(model.name, active.revision, active.name, active.params)
        return known

    def _keep_policy(self, model: str, revision: int, name: str, params: Any) -> tuple[int, Policy]:
        known = self._policies.get(model)
        if known is None or known[0] != revision:
            known = self._policies[model] = (revision, build_policy(name, params))
        return known

    async def tick(self, models: Sequence[ServedModel]) -> None:
        """Read all of it once. Raises RedisUnavailable."""
        replicas = await self._read_replicas()
        self._forgive_silence(time.monotonic())
        levels, *snapshots = await asyncio.gather(
            self._pipeline.send(Command(("HGETALL", self._keys.backpressure), dict)),
            *(self._pipeline.send(model.queue.snapshot()) for model in models),
        )
        for model, snapshot in zip(models, snapshots, strict=True):
            mine = [r for r in replicas if r.model == model.name]
            self._keep_policy(model.name, snapshot.revision, snapshot.policy, snapshot.params)
            before = read_level(levels.get(model.name.encode())) or CALM
            self._status[model.name] = self._assess(model.name, snapshot, mine, before)

    def _forgive_silence(self, now: float) -> None:
        """After a while without Redis nobody can say who served: begin anew."""
        if now - self._looked_s > LEVEL_LIFE_S:
            self._served_s.clear()
            self._started_s = now
        self._looked_s = now

    def note_depth(self, model: str, depth: int) -> None:
        """Learn the depth from an enqueue's own answer, so that a level rises before the next reading."""
        status = self._status.get(model)
        if status is None or depth < self._limits.depth[0] * self._queue_limit:
            return
        now = assess(self._limits, depth=depth, queue_limit=self._queue_limit, wait_s=None, kv_usage=0.0)
        if now.level > status.assessment.level:
            self._status[model] = replace(status, assessment=now)
            self._share(model, Standing(now, time.time()))

    async def _read_replicas(self) -> list[ReplicaStatus]:
        since = time.time() - DEAD_AFTER_S
        keys = self._keys
        names = await self._pipeline.send(
            Command(
                ("ZRANGE", keys.replicas, since, "+inf", "BYSCORE"), lambda reply: [name.decode() for name in reply]
            )
        )
        if not names:
            return []
        raws = await self._pipeline.send(Command(("MGET", *(keys.replica(name) for name in names)), list))
        return [self._decode(raw) for raw in raws if raw is not None]

    def _assess(
        self, model: str, snapshot: QueueSnapshot, replicas: list[ReplicaStatus], before: Standing
    ) -> FleetStatus:
        now = time.monotonic()
        serving = any(replica.state not in ("failed", "unhealthy") for replica in replicas)
        if serving:
            self._served_s[model] = now
        backlog = self._backlogs.setdefault(model, BacklogRate())
        backlog.observe(snapshot, now, serving=serving)
        reading = FleetStatus(time_s=time.time(), snapshot=snapshot, replicas=replicas)
        wait_s = backlog.wait_s(snapshot.waiting_tokens)
        rises, stays = (
            assess(
                limits, depth=snapshot.depth, queue_limit=self._queue_limit, wait_s=wait_s, kv_usage=reading.kv_usage
            )
            for limits in (self._limits, self._lowered)
        )
        standing = settle(before, rises=rises, stays=stays, hold_s=self._limits.hold_s, now_s=reading.time_s)
        self._share(model, standing)
        return replace(
            reading,
            assessment=standing.assessment,
            estimated_wait_s=wait_s,
            rate=backlog.rate,
            unserved_s=now - self._served_s.get(model, self._started_s),
        )

    def _share(self, model: str, standing: Standing) -> None:
        """Let the other processes know; nobody waits for it."""
        shared = SharedLevel(int(standing.assessment.level), standing.assessment.reason, standing.called_s, time.time())
        words = ("HSET", self._keys.backpressure, model, msgspec.msgpack.encode(shared))
        self._pipeline.send(Command(words, int)).add_done_callback(ignore_lost)


def read_level(raw: bytes | None) -> Standing | None:
    """A model's level in `Keys.backpressure`; None where no web process has written it lately."""
    shared = msgspec.msgpack.decode(raw, type=SharedLevel) if raw else None
    if shared is None or abs(time.time() - shared.time_s) > LEVEL_LIFE_S:
        return None
    return Standing(Assessment(Level(shared.level), shared.reason), shared.called_s)
