"""The sweeper: gives back what dead processes held. Idempotent, so any number may run."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import msgspec
import redis

from inference.cancelling import end_cancelled, finish_cancelled
from inference.messages import HISTORY_LENGTH, Finish, InferenceRequest, RequestEvent, State, unserved_event
from inference.shedding import add_message, end_dropped, is_sent_again
from scheduling.fleet import FleetQueue, RequestRecordView, Shed
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import TIME, Command, execute, execute_many
from scheduling.switch import Weights, place_unplaced

logger = logging.getLogger(__name__)

SLOT_GRACE_S = 15.0
"""A slot this young may belong to a request on its way into the queue, or to one whose end is being settled."""

SECOND_LOOK_S = 3.0
"""A web process whose heartbeat ran out because Redis was away has this long to beat again: a few heartbeats."""

SLOTS_AT_ONCE = 500
"""Requests looked up in one round trip."""

EXPIRED_AT_ONCE = 500
"""Requests past their deadline that one round drops from a queue; claims drop them too."""

SHED_GRACE_S = 3.0
"""Whoever dropped a request ends it at once, if it can."""


class Sweeper:
    """Returns the requests of dead engine processes to the queue, and cancels those of dead web processes."""

    def __init__(
        self, client: redis.Redis, keys: Keys, *, clock: Callable[[], float] | None = None, weights: Weights = dict
    ) -> None:
        """`clock` gives unix seconds, by default Redis's own: heartbeats and slots are stamped by that."""
        self._weights = weights
        self._client = client
        self._keys = keys
        self._clock = clock or partial(execute, client, TIME)
        self._lapsed: dict[tuple[str, str], float] = {}
        """Who let a heartbeat run out (the sorted set, and the name in it), and when that was first seen."""
        self._limits = TenantLimits(keys)

    def run_once(self) -> None:
        """One round over all queues. Raises RedisError."""
        queues = self._queues()
        for queue in queues:
            for owner, num_requeued in execute(self._client, queue.expire()):
                logger.warning("%s of %s is gone; %d requests go back to the queue.", owner, queue.model, num_requeued)
            place_unplaced(self._client, queue, self._weights)
            expired = execute(self._client, queue.drop_expired(limit=EXPIRED_AT_ONCE))
            end_dropped(self._client, queue, expired)
            self._end_shed(queue)
        for heartbeats, web in self._lapsed_long_enough():
            self._sweep_web(heartbeats, web, queues)

    def free_slots(self, tenants: Iterable[str]) -> int:
        """Give back concurrency slots of requests that have ended, or that no queue knows any more; how many.

        They leak where a process died between charging a request and enqueueing it, or Redis came back with older data.
        Where one died between ending a request and settling it, its record says what was used, and makes its history.
        """
        queues, num_freed, before_s = self._queues(), 0, self._clock() - SLOT_GRACE_S
        for tenant in tenants if queues else ():
            ids = execute(self._client, self._limits.slots(tenant, before_s))
            for batch in (ids[i : i + SLOTS_AT_ONCE] for i in range(0, len(ids), SLOTS_AT_ONCE)):
                over = self._over(queues, batch, before_s)
                for id_, (queue, ended_s) in over.items():
                    execute_many(self._client, self._settle_late(tenant, id_, queue, ended_s))
                num_freed += len(over)
        if num_freed:
            logger.warning("%d concurrency slots of lost requests are free again.", num_freed)
        return num_freed

    def _settle_late(self, tenant: str, request_id: str, queue: FleetQueue, ended_s: float) -> list[Command[Any]]:
        """What is owed of a request: its tokens, as far as its record is there to say how many, and then its history.

        Both may have been done meanwhile: a request is settled once, and the historian takes an id once.
        """
        record = execute(self._client, queue.record(request_id))
        try:
            event, refund = _end_of(record, ended_s) if record else (None, 0)
        except msgspec.MsgspecError as error:
            logger.error("The record of %s cannot be read: %s", request_id, error)
            event, refund = None, 0
        commands: list[Command[Any]] = [self._limits.settle(tenant, request_id, refund_tokens=refund)]
        if event is not None:
            commands.append(add_message(self._keys.history, HISTORY_LENGTH, msgspec.msgpack.encode([event])))
        return commands

    def _queues(self) -> list[FleetQueue]:
        """Of all models, withdrawn ones too."""
        with self._client.pipeline() as pipe:
            if deployed := self._client.hkeys(self._keys.deployments):
                pipe.sadd(self._keys.models, *deployed)
            pipe.smembers(self._keys.models)
            names = pipe.execute()[-1]
        return [FleetQueue(self._keys, model) for model in sorted(map(_text, names))]

    def _over(
        self, queues: Sequence[FleetQueue], ids: Sequence[str], before_s: float
    ) -> dict[str, tuple[FleetQueue, float]]:
        """Requests that ended before then (in which queue, and when), or that no queue knows (0: in any)."""
        ends = iter(execute_many(self._client, [queue.ended_s(id_) for id_ in ids for queue in queues]))
        over = {}
        for id_ in ids:
            each = [next(ends) for _ in queues]
            if all(end is not None and end < before_s for end in each):
                last = max(range(len(queues)), key=each.__getitem__)
                over[id_] = (queues[last], each[last])
        return over

    def _end_shed(self, queue: FleetQueue) -> None:
        """End what was dropped while it waited, by a process that died, or lost the answer."""
        for request_id in execute(self._client, queue.shed_before(self._clock() - SHED_GRACE_S)):
            record = execute(self._client, queue.record(request_id))
            if record is None:
                execute(self._client, queue.end_shed(request_id, b""))
            else:
                end_dropped(self._client, queue, [Shed(request_id, record.body, record.dropped or "shed")])

    def _lapsed_long_enough(self) -> list[tuple[str, str]]:
        """Web processes, and requests that clients waited for, silent at a first look and still so at a later one."""
        now_s = self._clock()
        silent = [
            (heartbeats, _text(name))
            for heartbeats in (self._keys.webs, self._keys.awaits)
            for name in self._client.zrangebyscore(heartbeats, "-inf", now_s)
        ]
        self._lapsed = {entry: self._lapsed.get(entry, now_s) for entry in silent}
        return [entry for entry, since_s in self._lapsed.items() if now_s - since_s >= SECOND_LOOK_S]

    def _sweep_web(self, heartbeats: str, web: str, queues: list[FleetQueue]) -> None:
        """Cancel what should reply to it (a request that clients waited for replies to itself); then forget it."""
        num_cancelled = num_running = 0
        for queue in queues:
            for request_id in execute(self._client, queue.reply_to_requests(web)):
                answer = execute(self._client, queue.cancel(request_id))
                num_running += answer.status == "running"
                if answer.status == "queued":
                    self._end(request_id, answer.body or b"")
                    num_cancelled += 1
        if num_cancelled:
            logger.warning("Nobody waits at %s any more; %d waiting requests are cancelled.", web, num_cancelled)
        if not num_running:
            with self._client.pipeline() as pipe:
                pipe.zrem(heartbeats, web)
                pipe.delete(self._keys.replies(web))
                pipe.execute()

    def _end(self, request_id: str, body: bytes) -> None:
        """Settle a cancelled request's limits and write its history, as its web process would have.

        One that another version wrote so that it cannot be read ends without; its slot is freed as a lost one.
        """
        try:
            request = msgspec.msgpack.decode(body, type=InferenceRequest)
        except msgspec.MsgspecError as error:
            logger.error("Request %s was cancelled, and cannot be read: %s", request_id, error)
            return
        execute_many(self._client, end_cancelled(self._keys, request, attempt=None, error_code="client_gone"))


def _end_of(record: RequestRecordView, ended_s: float) -> tuple[RequestEvent | None, int]:
    """How a request ended, by its record alone (None: it is sent again), and what of its charge was not used."""
    request = msgspec.msgpack.decode(record.body, type=InferenceRequest)
    finish = finish_cancelled(request)
    if record.finish is not None:
        finish = msgspec.msgpack.decode(record.finish, type=Finish)
    # One without was cancelled as it waited, and one that was never claimed has computed nothing.
    used = finish.prompt_tokens + finish.completion_tokens if record.finish is not None and record.attempt else 0
    if is_sent_again(request, finish.error_code):
        return None, request.charged_tokens - used
    state = cast(State, record.state)
    event = unserved_event(request, state=state, reason=finish.reason, now_s=ended_s, error_code=finish.error_code)
    event = msgspec.structs.replace(
        event,
        prompt_tokens=finish.prompt_tokens,
        completion_tokens=finish.completion_tokens,
        attempts=record.attempt,
    )
    return event, request.charged_tokens - used


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
