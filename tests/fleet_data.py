"""Puts real messages into Redis as web and gpu processes do: deployments, requests, statuses of replicas."""

import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import redis

from inference.messages import (
    LATENCY_BUCKETS_S,
    DeploymentSpec,
    Finish,
    Histogram,
    InferenceRequest,
    ReplicaState,
    ReplicaStatus,
    Slot,
    Telemetry,
)
from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.core.sequence import SamplingParams
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.store import execute

OWNER = "gpu-0:1"


@dataclass(slots=True)
class FleetWriter:
    """Writes for one model. A status stands for `ttl_s`; engine processes renew theirs four times a second."""

    client: redis.Redis
    keys: Keys
    model: str = "demo"
    started_s: float = field(default_factory=time.time)

    @property
    def queue(self) -> FleetQueue:
        return FleetQueue(self.keys, self.model)

    def deploy(self, max_batch_size: int = 16) -> None:
        """Publish the model, as the ops process does."""
        spec = DeploymentSpec(name=self.model, path="/models/demo", max_batch_size=max_batch_size)
        self.client.hset(self.keys.deployments, self.model, msgspec.json.encode(spec))

    def enqueue(self, tenant: str, priority: int = 3, *, age_s: float = 0.0, prompt_tokens: int = 24) -> str:
        """Queue a request, placed by the active policy, as the gateway does."""
        active = execute(self.client, self.queue.active_policy())
        request_id = f"req-{uuid.uuid4().hex[:12]}"
        arrival_s = time.time() - age_s
        entry = QueueEntry(
            id=request_id,
            tenant=tenant,
            priority=priority,
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            max_tokens=64,
        )
        body = InferenceRequest(
            id=request_id,
            model=self.model,
            tenant=tenant,
            priority=priority,
            arrival_s=arrival_s,
            prompt_token_ids=[1] * prompt_tokens,
            max_tokens=64,
            sampling=SamplingParams(),
        )
        placement = build_policy(active.name, active.params).place(entry)
        command = self.queue.enqueue(
            entry, placement, revision=active.revision, body=msgspec.msgpack.encode(body), depth_limit=100_000
        )
        assert execute(self.client, command).status == "queued"
        return request_id

    def claim(self, num: int = 1) -> list[InferenceRequest]:
        """Claim requests as an engine process does."""
        claimed = execute(self.client, self.queue.claim(OWNER, max_requests=num, max_tokens=10**9, lease_s=60))
        return [msgspec.msgpack.decode(request.body, type=InferenceRequest) for request in claimed.requests]

    def finish(self, request: InferenceRequest, completion_tokens: int = 32) -> None:
        """End a claimed request."""
        end = Finish(reason="length", prompt_tokens=len(request.prompt_token_ids), completion_tokens=completion_tokens)
        used = end.prompt_tokens + end.completion_tokens
        raw = msgspec.msgpack.encode(end)
        execute(
            self.client,
            self.queue.finish(OWNER, request.id, 1, state="finished", used_tokens=used, finish=raw, output="text"),
        )

    def status(
        self,
        replica: str = "gpu-0",
        *,
        slots: Sequence[Slot] = (),
        state: ReplicaState = "ready",
        revision: int = 0,
        policy: str = "fifo",
        waits_s: Sequence[float] = (),
        telemetry: Telemetry | None = None,
        kv_used: int = 0,
    ) -> ReplicaStatus:
        """What an engine process with these sequences says of itself."""
        tokens = sum(slot.prompt_tokens + slot.output_tokens for slot in slots)
        waits = histogram(waits_s)
        return ReplicaStatus(
            replica=replica, model=self.model, host="node-1", pid=4242, state=state, time_s=time.time(),
            started_s=self.started_s, max_batch_size=16, slots=list(slots), batch_tokens=tokens, kv_blocks_total=2048,
            kv_blocks_used=kv_used or tokens // 16, tokens_per_s=61.5 * len(slots), step_ms_p50=11.8, step_ms_p99=19.4,
            policy=policy, policy_revision=revision, queue_time=waits, time_to_first_token=waits,
            time_per_output_token=histogram([w / 50 for w in waits_s]), end_to_end=histogram([w * 4 for w in waits_s]),
            telemetry=telemetry or Telemetry(source="host", device="CPU, 2 cores", utilization_percent=87.5,
                                             memory_used_bytes=3_400_000_000, memory_total_bytes=8_000_000_000),
        )  # fmt: skip

    def publish(self, status: ReplicaStatus, ttl_s: float = 600) -> None:
        """Set a replica's status."""
        self.client.set(self.keys.replica(status.replica), msgspec.msgpack.encode(status), px=int(ttl_s * 1000))
        self.client.zadd(self.keys.replicas, {status.replica: status.time_s})


def histogram(samples_s: Sequence[float]) -> Histogram:
    """The cumulative histogram of these samples."""
    counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
    for sample in samples_s:
        counts[next((i for i, bound in enumerate(LATENCY_BUCKETS_S) if sample <= bound), -1)] += 1
    return Histogram(counts, sum(samples_s))


def slots(num: int, tenants: Sequence[str], *, seed: int = 1) -> list[Slot]:
    """Running requests of these tenants in turn."""
    rng = random.Random(seed)
    made = []
    for i in range(num):
        most = rng.choice([64, 128, 256])
        made.append(
            Slot(
                f"req-{rng.getrandbits(48):012x}",
                tenants[i % len(tenants)],
                rng.randrange(6),
                rng.randrange(16, 256),
                rng.randrange(1, most),
                most,
            )
        )
    return made
