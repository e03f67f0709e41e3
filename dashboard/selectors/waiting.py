"""Requests that have not ended, from the queue's store: what runs and where, what waits and why."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from inference.messages import InferenceRequest, ReplicaStatus, Slot
from inference.services import read_replicas
from scheduling.connection import live_keys, live_redis
from scheduling.core.answers import Position, QueueSnapshot, RequestRecordView
from scheduling.core.policies import PolicyError, build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.models import Tenant
from scheduling.store import execute, execute_many

MAX_WAITING = 200
MAX_NAMED = 4
KV_FULL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """A request that runs on `replica`, or waits where that is empty. Times are unix seconds."""

    id: str
    tenant: str
    priority: int
    state: str
    prompt_tokens: int
    max_tokens: int
    output_tokens: int = 0
    arrival_s: float | None = None
    replica: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequests:
    """What runs, and what waits, longest first; with more than MAX_WAITING waiting, as many of them at random."""

    running: list[LiveRequest] = field(default_factory=list)
    waiting: list[LiveRequest] = field(default_factory=list)
    num_waiting: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A request as its record in the queue's store has it, and what surrounds it."""

    request: InferenceRequest
    record: RequestRecordView
    snapshot: QueueSnapshot
    position: Position | None
    replicas: list[ReplicaStatus]
    others: list[QueueEntry] = field(default_factory=list)
    """Where it waits: what else does, or so many of them drawn at random."""

    @property
    def running(self) -> tuple[str, Slot] | None:
        """On which replica it runs, and what that says of it; None where no worker has named it yet."""
        found = ((status.replica, slot) for status in self.replicas for slot in status.slots)
        return next(((name, slot) for name, slot in found if slot.request_id == self.request.id), None)

    @property
    def replica(self) -> str:
        """Where it runs, as far as a worker has said so."""
        return self.running[0] if self.running else ""


def list_live(model: str) -> LiveRequests:
    """What of a model has not ended. Raises RedisError or OSError."""
    client, queue = live_redis(), FleetQueue(live_keys(), model)
    snapshot, entries = execute_many(client, [queue.snapshot(), queue.sample(MAX_WAITING)])
    running = [
        LiveRequest(
            id=slot.request_id,
            tenant=slot.tenant,
            priority=slot.priority,
            state="running",
            prompt_tokens=slot.prompt_tokens,
            max_tokens=slot.max_tokens,
            output_tokens=slot.output_tokens,
            replica=status.replica,
        )
        for status in read_replicas(client, live_keys())
        if status.model == model
        for slot in status.slots
    ]
    waiting = [_waiting(entry) for entry in sorted(entries, key=lambda entry: entry.arrival_s)]
    return LiveRequests(running=running, waiting=waiting, num_waiting=snapshot.depth)


def find_held(request_id: str, models: Sequence[str]) -> Held | None:
    """A request in the queue's store; kept there for a while after its end. Raises RedisError or OSError."""
    client = live_redis()
    queues = [FleetQueue(live_keys(), model) for model in models]
    records = execute_many(client, [queue.record(request_id) for queue in queues])
    for queue, record in zip(queues, records, strict=True):
        if record is None:
            continue
        waits = record.state == "queued"
        position = execute(client, queue.position(request_id)) if waits else None
        return Held(
            request=msgspec.msgpack.decode(record.body, type=InferenceRequest),
            record=record,
            snapshot=execute(client, queue.snapshot()),
            position=position,
            replicas=[status for status in read_replicas(client, live_keys()) if status.model == queue.model],
            others=execute(client, queue.sample(MAX_WAITING)) if waits else [],
        )
    return None


def explain_wait(held: Held) -> list[str]:
    """Why a request still waits: who goes before it, by which rank, and what is lacking. Sentences."""
    position, snapshot = held.position, held.snapshot
    reasons = []
    if position is not None and position.overall:
        of_others = max(0, position.overall - position.in_flow)
        split = f": {position.in_flow} of its own flow, about {of_others} of others" if of_others else ""
        reasons.append(f"{position.overall} of {snapshot.depth} waiting requests go before it{split}.")
    elif position is not None:
        reasons.append("It is the next to be claimed.")
    reasons += [sentence for sentence in (explain_others(held), explain_rank(held)) if sentence]
    reasons.append(_explain_capacity(held.replicas))
    return reasons


def explain_others(held: Held) -> str:
    """Behind whom it waits, by tenant; "" where nobody is before it, or for a policy of another version."""
    try:
        policy = build_policy(held.snapshot.policy, held.snapshot.params)
    except PolicyError:
        return ""
    mine = policy.place(_entry(held.request))
    before: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    for entry in held.others:
        place = policy.place(entry)
        if entry.id == held.request.id:
            continue
        if place.flow != mine.flow:
            beside[entry.tenant] += 1
        elif place.rank < mine.rank:
            before[entry.tenant] += 1
    drawn = f", of {len(held.others)} drawn at random" if held.snapshot.depth > len(held.others) else ""
    ahead = f"Before it in its flow: {_named(before)}{drawn}." if before else ""
    flows = f"Other flows, which take turns by what they were served: {_named(beside)}{drawn}." if beside else ""
    return " ".join(filter(None, (ahead, flows)))


def _named(tenants: Counter[str]) -> str:
    shown = [f"{num} of {name}" for name, num in tenants.most_common(MAX_NAMED)]
    rest = tenants.total() - sum(num for _, num in tenants.most_common(MAX_NAMED))
    return ", ".join([*shown, *([f"{rest} of others"] if rest else [])])


def explain_rank(held: Held) -> str:
    """Where the active policy puts the request. A sentence, "" for a policy of another version."""
    share = Tenant.objects.filter(name=held.request.tenant).values_list("weight", flat=True).first()
    snapshot = held.snapshot
    return explain_place(snapshot.policy, snapshot.params, snapshot.revision, _entry(held.request, share or 1.0))


def explain_place(policy: str, params: Mapping[str, Any], revision: int, entry: QueueEntry) -> str:
    """Where a policy puts a request: rank, flow, weight. A sentence, "" for a policy of another version."""
    try:
        place = build_policy(policy, params).place(entry)
    except PolicyError:
        return ""
    ahead_s = entry.arrival_s - place.rank
    if abs(ahead_s) < 0.01:
        rank = "by its arrival"
    else:
        rank = f"as if it had come {abs(ahead_s):.0f} s {'earlier' if ahead_s > 0 else 'later'}"
    flow = "" if place.flow == "all" else f", in flow {place.flow} of weight {place.weight:g}"
    return f"{policy}, revision {revision}, ranks it {rank}{flow}."


def _entry(request: InferenceRequest, share: float = 1.0) -> QueueEntry:
    return QueueEntry(
        id=request.id,
        tenant=request.tenant,
        priority=request.priority,
        arrival_s=request.arrival_s,
        prompt_tokens=request.num_prompt_tokens,
        max_tokens=request.max_tokens,
        deadline_s=request.deadline_s,
        share=share,
    )


def _explain_capacity(replicas: Sequence[ReplicaStatus]) -> str:
    ready = [status for status in replicas if status.state == "ready"]
    if not replicas:
        return "No worker serves this model."
    if not ready:
        return f"No worker claims: {', '.join(f'{status.replica} is {status.state}' for status in replicas)}."
    free = sum(max(0, status.max_batch_size - len(status.slots)) for status in ready)
    total = sum(status.max_batch_size for status in ready)
    if not free:
        return f"All {total} slots are taken."
    used, blocks = sum(s.kv_blocks_used for s in ready), sum(s.kv_blocks_total for s in ready)
    if blocks and used / blocks > KV_FULL:
        return f"{free} of {total} slots are free, but {used / blocks:.0%} of the KV cache is in use."
    return f"{free} of {total} slots are free; the next claim takes it, or those before it."


def _waiting(entry: QueueEntry) -> LiveRequest:
    return LiveRequest(
        id=entry.id,
        tenant=entry.tenant,
        priority=entry.priority,
        state="queued",
        prompt_tokens=entry.prompt_tokens,
        max_tokens=entry.max_tokens,
        arrival_s=min(entry.arrival_s, time.time()),
    )
