"""Letting one request in: length, backpressure, the tenant's limits, and its place in the fleet queue."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from inference.directory import TenantConfig
from inference.gateway.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    NoReplica,
    Overloaded,
    QueueFull,
    RateLimited,
    RedisUnavailable,
    Unavailable,
)
from inference.gateway.monitor import FleetMonitor
from inference.gateway.pipeline import CommandPipeline, ignore_lost
from inference.gateway.served import ServedModel
from inference.messages import InferenceRequest
from inference.shedding import tell_end, write_end
from inference.traces import current_traceparent
from scheduling.core.backpressure import BackpressureLimits, depth_limit, excess_wait_s, release_depth
from scheduling.core.request import Priority, QueueEntry
from scheduling.core.sequence import SamplingParams
from scheduling.fleet import Enqueued, FleetQueue, Shed
from scheduling.keys import Keys
from scheduling.limits import Admission, TenantLimits
from scheduling.store import Command

log = logging.getLogger(__name__)
REDIS_WAIT_S = 2.0
"""How long a new request waits for a Redis that went away."""
LONGEST_RETRY_S = 600.0
"""No client is asked to come again later than this."""
WANT_OF_CAPACITY = frozenset({NoReplica.code, Overloaded.code, QueueFull.code})
"""Refusals that are our fault and not the tenant's: each is a request that missed its service level."""
MAX_PLACEMENTS = 20
"""Policy switches a single request may lose against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A validated, tokenized request that has not been let in yet."""

    id: str
    endpoint: str
    model: ServedModel
    tenant: TenantConfig
    prompt_token_ids: Sequence[int]
    max_tokens: int
    sampling: SamplingParams
    priority: int
    deadline_s: float | None = None
    """Unix time by which the answer should be complete."""
    user: str = ""
    reply_to: str = ""
    keep_s: int = 60
    forwarded: bytes = b""
    """What an upstream server is sent in place of tokens, and how long its prompt is, as counted or guessed here."""
    estimated_prompt_tokens: int = 0
    others: tuple[str, ...] = ()
    """Ids of further answers to the same request, which are charged with this one: all of them or none."""
    comes_again: bool = False
    """Whoever sends it does so until it is served, and no client hears of a refusal, or that it was shed."""

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.estimated_prompt_tokens or len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """What this answer is charged: its prompt, and the longest completion."""
        return self.num_prompt_tokens + self.max_tokens

    @property
    def num_all_tokens(self) -> int:
        """Of all answers together."""
        return (1 + len(self.others)) * self.num_tokens


class AdmissionDesk:
    """Takes drafts through admission in order; the first refusal is raised and counted."""

    def __init__(
        self,
        pipeline: CommandPipeline,
        monitor: FleetMonitor,
        keys: Keys,
        *,
        queue_limit: int,
        limits: BackpressureLimits,
        queue_tokens: int | None = None,
        no_replica_s: float = 0.0,
    ) -> None:
        self._pipeline = pipeline
        self._monitor = monitor
        self._keys = keys
        self._queue_limit = queue_limit
        self._queue_tokens = queue_tokens
        self._no_replica_s = no_replica_s
        self._endings: set[asyncio.Task[None]] = set()
        self._backpressure = limits
        self.limits = TenantLimits(keys)

    async def admit(self, draft: Draft, request: InferenceRequest) -> Admission:
        """Charge the tenant and enqueue.

        Raises ContextLengthExceeded, DeadlineExceeded, NoReplica, Overloaded, RateLimited, QueueFull or
        RedisUnavailable.
        """
        check_length(draft)
        self._check_deadline(draft)
        self._check_served(draft)
        max_depth = self._check_backpressure(draft)
        if _is_unlimited(draft.tenant):
            # The charge cannot be refused, so both go in one round trip; the charge is the first of them.
            charge = self._charge_command(draft)
            charging = self._pipeline.send(charge)
            charging.add_done_callback(ignore_lost)
            await self._enqueue(draft, request, max_depth)
            try:
                return await charging
            except RedisUnavailable:  # as the enqueue at first; a slot taken after the request's end the sweeper frees
                return await self._pipeline.send_within(charge, REDIS_WAIT_S)
        admission = await self._charge(draft)
        try:
            await self._enqueue(draft, request, max_depth)
        except Unavailable as error:
            error.admission = admission
            raise
        return admission

    def _check_deadline(self, draft: Draft) -> None:
        if draft.tenant.drop_expired and draft.deadline_s is not None and draft.deadline_s <= time.time():
            self.count_refusal(draft, DeadlineExceeded.code)
            raise DeadlineExceeded("The request's deadline had passed when it was to enter the queue.")

    def _check_served(self, draft: Draft) -> None:
        if reason := self.why_unserved(draft.model.name):
            self.count_refusal(draft, NoReplica.code)
            raise NoReplica(reason)

    def why_unserved(self, model: str) -> str:
        """A sentence where requests of a model are refused since nobody serves it; "" otherwise."""
        silent_s = self._monitor.status(model).unserved_s
        if not self._no_replica_s or silent_s <= self._no_replica_s:
            return ""
        return f"No worker has served the model '{model}' for {silent_s:.0f} s."

    def _check_backpressure(self, draft: Draft) -> int:
        """The depth at which a request of this priority is refused."""
        assessment = self._monitor.status(draft.model.name).assessment
        max_depth = depth_limit(draft.priority, self._queue_limit, assessment.level, self._backpressure)
        if max_depth <= 0:
            self.count_refusal(draft, "overloaded")
            raise Overloaded(
                f"Requests of priority {Priority(draft.priority).name.lower()} are refused at the moment: "
                f"{assessment.reason}.",
                retry_after_s=self.drain_time_s(draft.model.name, draft.priority),
            )
        return max_depth

    def _check_possible(self, draft: Draft) -> None:
        """Refuse what the tenant's limits will never allow, however long its client waits."""
        tenant, num = draft.tenant, 1 + len(draft.others)
        answers, tokens = f"{num} answers", draft.num_all_tokens
        asked = f"{tokens} tokens (prompt and max_tokens together)"
        checks = [
            ("tokens_per_minute", tenant.tpm, tokens, asked, "limit of {} tokens per minute", "max_tokens"),
            ("tokens_per_day", tenant.tpd, tokens, asked, "budget of {} tokens per day", "max_tokens"),
        ]
        if num > 1:
            checks += [
                ("requests_per_minute", tenant.rpm, num, answers, "limit of {} requests per minute", "n"),
                ("concurrency", tenant.concurrency, num, answers, "limit of {} concurrent requests", "n"),
            ]
        for reason, limit, amount, what, of, param in checks:
            if limit is not None and amount > limit:
                self.count_refusal(draft, reason)
                raise InvalidRequest(
                    f"The request asks for {what}, more than the {of.format(limit)} ever allows.",
                    code=f"request_exceeds_{reason}",
                    param=param,
                )

    async def _charge(self, draft: Draft) -> Admission:
        self._check_possible(draft)
        admission = await self._pipeline.send_within(self._charge_command(draft), REDIS_WAIT_S)
        if not admission.ok:
            self.count_refusal(draft, admission.reason)
            if admission.reason == "concurrency":
                admission = replace(admission, retry_after_s=self._slot_time_s(draft, admission.retry_after_s))
            raise _limit_reached(admission, draft)
        return admission

    def _charge_command(self, draft: Draft) -> Command[Admission]:
        tenant = draft.tenant
        return self.limits.acquire(
            tenant.name,
            draft.id,
            rpm=tenant.rpm,
            tpm=tenant.tpm,
            tpd=tenant.tpd,
            concurrency=tenant.concurrency,
            tokens=draft.num_all_tokens,
            others=draft.others,
        )

    async def _enqueue(self, draft: Draft, request: InferenceRequest, max_depth: int) -> None:
        body = msgspec.msgpack.encode(request)
        entry = QueueEntry(
            id=request.id,
            tenant=request.tenant,
            priority=request.priority,
            arrival_s=request.arrival_s,
            prompt_tokens=request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            deadline_s=request.deadline_s,
            share=draft.tenant.weight,
            drop_expired=draft.tenant.drop_expired,
        )
        queue = draft.model.queue
        for attempt in range(MAX_PLACEMENTS):
            revision, policy = await self._monitor.active_policy(draft.model, fresh=attempt > 0)
            command = queue.enqueue(
                entry,
                policy.place(entry),
                revision=revision,
                body=body,
                depth_limit=max_depth,
                reply_to=request.reply_to,
                keep_s=request.keep_s,
                tokens_limit=self._queue_tokens,
                shed=True,
            )
            answer = await self._pipeline.send_within(command, REDIS_WAIT_S)
            for shed in answer.shed:
                self._end_shed(queue, shed)
            self._monitor.note_depth(draft.model.name, answer.depth)
            if answer.status in ("queued", "duplicate"):  # a duplicate is our own, sent again after a lost reply
                return
            if answer.status == "full":
                await self._refuse_full(draft, request, answer)
        await self._give_back(request)
        raise Unavailable("The queue's policy changes too often to place the request.")

    def _end_shed(self, queue: FleetQueue, shed: Shed) -> None:
        """Tell whoever had to go; nobody waits for it. What Redis does not take is left to the sweeper."""
        task = asyncio.get_running_loop().create_task(self._tell_shed(queue, shed))
        self._endings.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._endings.discard)

    async def _tell_shed(self, queue: FleetQueue, shed: Shed) -> None:
        request = msgspec.msgpack.decode(shed.body, type=InferenceRequest)
        with contextlib.suppress(RedisUnavailable):
            if await self._pipeline.send(write_end(queue, request, shed.reason)):
                await asyncio.gather(*map(self._pipeline.send, tell_end(queue, request, shed.reason)))

    async def _refuse_full(self, draft: Draft, request: InferenceRequest, answer: Enqueued) -> None:
        await self._give_back(request)
        self.count_refusal(draft, "queue_full")
        depth, waiting, excess, level = answer.depth, answer.waiting_tokens, 0, Priority(draft.priority).name.lower()
        sentence = f"{depth} requests wait already, which is the bound for priority {level}."
        if waiting is not None and self._queue_tokens is not None:
            # Once nothing waits it is let in, however long it is.
            excess = min(waiting, waiting + draft.num_tokens - self._queue_tokens)
            sentence = (
                f"Requests of {waiting} tokens (prompt and max_tokens together) wait already; with the "
                f"{draft.num_tokens} of this one they would be above the bound of {self._queue_tokens}."
            )
        raise QueueFull(sentence, retry_after_s=self.drain_time_s(draft.model.name, draft.priority, excess))

    async def _give_back(self, request: InferenceRequest) -> None:
        command = self.limits.cancel_charge(request.tenant, request.id, tokens=request.charged_tokens)
        await self._pipeline.send_within(command, REDIS_WAIT_S)

    def drain_time_s(self, model: str, priority: int, excess_tokens: int = 0) -> float:
        """Seconds until a request of this priority will probably be let in, so many waiting tokens having drained."""
        status = self._monitor.status(model)
        depth = status.snapshot.depth if status.snapshot else 0
        target = release_depth(priority, self._queue_limit, self._backpressure)
        by_depth = status.rate.retry_after_s(depth, min(target, depth))
        by_wait = excess_wait_s(priority, status.estimated_wait_s, self._backpressure)
        by_tokens = status.rate.tokens_retry_after_s(excess_tokens) if excess_tokens else 0
        return min(LONGEST_RETRY_S, max(by_depth, by_wait, by_tokens) + self._backpressure.hold_s)

    def _slot_time_s(self, draft: Draft, least_s: float) -> float:
        """Seconds until one of the tenant's requests has probably ended; `least_s` where that is not known."""
        status = self._monitor.status(draft.model.name)
        if status.snapshot is None:
            return least_s
        num_here = status.snapshot.depth + status.snapshot.running
        slot_s = status.rate.slot_s(num_here, draft.tenant.concurrency or 1)
        return least_s if slot_s is None else min(LONGEST_RETRY_S, max(least_s, slot_s))

    def count_refusal(self, draft: Draft, reason: str) -> None:
        """Count a refusal for the metrics; nobody waits for it."""
        whose = f"{draft.model.name}|{draft.tenant.name}"
        counters = [(self._keys.refusals, f"{whose}|{reason}")]
        if reason in WANT_OF_CAPACITY and not draft.comes_again:
            counters.append((self._keys.turned_away, f"{whose}|{draft.priority}"))
        for key, field in counters:
            future = self._pipeline.send(Command(("HINCRBY", key, field, 1), int))
            future.add_done_callback(ignore_lost)


def check_length(draft: Draft) -> None:
    """Raises ContextLengthExceeded where prompt and completion do not fit the model's context."""
    num_prompt, limit = draft.num_prompt_tokens, draft.model.max_model_len
    if draft.num_tokens > limit:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. You requested {draft.num_tokens} "
            f"tokens ({num_prompt} in the prompt, {draft.max_tokens} for the completion).",
            param="messages" if draft.endpoint == "chat.completions" else "prompt",
        )


def to_request(draft: Draft) -> InferenceRequest:
    """The request as it goes into the queue, arriving now."""
    return InferenceRequest(
        id=draft.id,
        model=draft.model.name,
        tenant=draft.tenant.name,
        priority=draft.priority,
        arrival_s=time.time(),
        prompt_token_ids=list(draft.prompt_token_ids),
        max_tokens=draft.max_tokens,
        sampling=draft.sampling,
        reply_to=draft.reply_to,
        endpoint=draft.endpoint,
        deadline_s=draft.deadline_s,
        user=draft.user,
        charged_tokens=draft.num_tokens,
        keep_s=draft.keep_s,
        traceparent=current_traceparent.get(),
        forwarded=draft.forwarded,
        estimated_prompt_tokens=draft.estimated_prompt_tokens,
        comes_again=draft.comes_again,
    )


def _is_unlimited(tenant: TenantConfig) -> bool:
    return tenant.rpm is tenant.tpm is tenant.tpd is tenant.concurrency is None


def _limit_reached(admission: Admission, draft: Draft) -> RateLimited:
    tokens, tpd = draft.num_all_tokens, draft.tenant.tpd
    sentences = {
        "requests_per_minute": f"The limit of {admission.limit_requests} requests per minute is reached.",
        "tokens_per_minute": f"The limit of {admission.limit_tokens} tokens per minute is reached: this request asks "
        f"for {tokens} (prompt and max_tokens together).",
        "tokens_per_day": f"What is left of today's {tpd} tokens (UTC) is less than this request asks for: {tokens} "
        "(prompt and max_tokens together).",
        "concurrency": "The limit of concurrent requests is reached.",
    }
    return RateLimited(
        sentences[admission.reason],
        code=f"{admission.reason}_exceeded",
        retry_after_s=admission.retry_after_s,
        admission=admission,
    )
