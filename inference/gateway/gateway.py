"""The gateway of one web process: lets requests in, hands out their replies, cancels what nobody waits for."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from inference.cancelling import end_cancelled, settle_cancelled
from inference.directory import Directory, DirectoryWatch
from inference.gateway.admission import AdmissionDesk, Draft, to_request
from inference.gateway.errors import GatewayError, RedisUnavailable, RequestLost, ShuttingDown
from inference.gateway.following import FollowedReplies
from inference.gateway.idempotency import IdempotencyKey, OnceDesk
from inference.gateway.monitor import PERIOD_S, FleetMonitor, FleetStatus
from inference.gateway.pipeline import CommandPipeline, ignore_lost
from inference.gateway.repair import read_missing
from inference.gateway.replies import ReplyReader
from inference.gateway.reply import Reply
from inference.gateway.served import ServedModel, ServedModels
from inference.messages import InferenceRequest
from scheduling.core.backpressure import BackpressureLimits
from scheduling.fleet import RequestRecordView
from scheduling.keys import Keys
from scheduling.store import TIME, Command

log = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
HEARTBEAT_LIFE_S = 15.0
"""How long this process may be silent (Redis restarting, say) before the sweeper cancels its requests."""
AWAITED_S = 30.0
"""How long a request with an idempotency key goes on after its last client has left, so that a retry finds it."""
SIGN_OF_LIFE_S = 15.0
"""An answer idle for this long gets a comment line, so that proxies keep the connection."""
STALLED_S = 3.0
"""A request silent for this long is looked up, in case its end was lost on the way."""
STALLED_UNHEARD_S = 10.0
"""The same before its first token: it probably waits in the queue."""
REPLIES_KEEP_S = 60
"""How long the reply stream of a process that stopped is there for workers who have not heard of it."""
PATIENCE_S = 600.0
"""How long a cancellation is tried while Redis is away."""


class Gateway:
    """Start once per web process, inside its event loop.

    With `no_replica_s`, requests of a model are refused once no replica of it has reported for so long.
    """

    def __init__(
        self,
        redis_url: str,
        keys: Keys,
        directory: DirectoryWatch,
        *,
        name: str = "",
        queue_limit: int = 20_000,
        queue_tokens: int | None = None,
        idempotency_keep_s: int = 600,
        no_replica_s: float = 0.0,
        backpressure: BackpressureLimits | None = None,
    ) -> None:
        once = Retry(NoBackoff(), 0)
        # With a timeout of its own the client makes a task of every write; whoever awaits it here has one instead.
        options: dict[str, Any] = {
            "protocol": 2,
            "retry": once,
            "socket_connect_timeout": 2.0,
            "socket_timeout": None,
        }
        self._client = redis.asyncio.Redis.from_url(redis_url, **options)
        self._reader_client = redis.asyncio.Redis.from_url(redis_url, **options)
        self._reader_client.set_response_callback("XREAD", _as_is)  # type: ignore[arg-type]
        self.name = name or uuid.uuid4().hex[:16]
        self.keys = keys
        self.queue_limit = queue_limit
        self.pipeline = CommandPipeline(self._client)
        self.models = ServedModels(keys)
        limits = backpressure or BackpressureLimits()
        self.monitor = FleetMonitor(self.pipeline, keys, queue_limit, limits)
        self.desk = AdmissionDesk(
            self.pipeline,
            self.monitor,
            keys,
            queue_limit=queue_limit,
            limits=limits,
            queue_tokens=queue_tokens,
            no_replica_s=no_replica_s,
        )
        self._directory = directory
        self._reader = ReplyReader(
            self._reader_client, keys.replies(self.name), on_gap=self._on_gap, on_return=self._on_return
        )
        self._followed = FollowedReplies(
            self._reader_client, keys.replies(f"{self.name}:wake"), on_return=self._on_return
        )
        self._once = OnceDesk(self.pipeline, keys, admit=self._admit_shared, follow=self._follow)
        self._keep_s = idempotency_keep_s
        self._replies: dict[str, Reply] = {}
        self._shared: set[Reply] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self.closing = False
        """Set when the process is to stop: requests in flight go on, new ones are refused."""

    @property
    def directory(self) -> Directory:
        """Tenants, keys and deployments as they are now."""
        return self._directory.current

    @property
    def num_replies(self) -> int:
        """Requests in flight through this process."""
        return len(self._replies) + len(self._shared)

    async def start(self) -> None:
        """Load the models' tokenizers and begin to read replies; a Redis that is away is waited for meanwhile."""
        await self.models.refresh(self.directory.deployments)
        with contextlib.suppress(RedisUnavailable):
            await self._beat()
            await self.monitor.tick(self.models.loaded())
        self._loops = [
            asyncio.create_task(coroutine, name=name)
            for name, coroutine in (
                ("gateway-replies", self._reader.run()),
                ("gateway-followed", self._followed.run()),
                ("gateway-status", self._repeat(self._watch_fleet, PERIOD_S)),
                ("gateway-heartbeat", self._repeat(self._beat, HEARTBEAT_S)),
            )
        ]

    async def stop(self) -> None:
        """Cancel what is in flight, leave Redis clean, close connections."""
        self.begin_shutdown()
        self.end_replies()
        for reply in self._all_replies():
            reply.abandon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        for task in (*self._loops, *self._tasks):
            task.cancel()
        await asyncio.gather(*self._loops, *self._tasks, return_exceptions=True)
        with contextlib.suppress(RedisUnavailable):
            await self.pipeline.send(Command(("ZREM", self.keys.webs, self.name), int))
            # Workers may still write there, and would make it anew without an end.
            await self.pipeline.send(Command(("EXPIRE", self.keys.replies(self.name), REPLIES_KEEP_S), int))
        await self._client.aclose()
        await self._reader_client.aclose()

    def begin_shutdown(self) -> None:
        """Refuse new requests from now on."""
        self.closing = True

    def end_replies(self) -> None:
        """Tell every client in flight that the process stops."""
        for reply in self._all_replies():
            reply.mailbox.fail(ShuttingDown())

    # Requests

    async def submit(self, draft: Draft, key: IdempotencyKey | None = None) -> Reply:
        """Let a request in and hand out its reply; with a key, that of the request that the key stands for.

        Raises GatewayError: its kind says which check refused it.
        """
        if self.closing:
            raise ShuttingDown
        return await (self._admit(draft) if key is None else self._once.submit(draft, key))

    async def _admit(self, draft: Draft) -> Reply:
        reply = self._reply(draft.model, to_request(draft))
        if draft.reply_to:
            self._register(reply)
        try:
            reply.admission = await self.desk.admit(draft, reply.request)
        except BaseException as error:
            self._forget(reply)
            if not isinstance(error, GatewayError) or isinstance(error, RedisUnavailable):
                # It may have come into the queue although the answer was lost.
                self._spawn(self._cancel(draft.model, reply.request, withdrawn=True))
            raise
        reply.entered = True
        return reply

    async def _admit_shared(self, draft: Draft) -> Reply:
        """The first request of an idempotency key: its updates get a stream of their own, its record stays longer."""
        reply_to = draft.id if draft.reply_to else ""
        return await self._admit(replace(draft, reply_to=reply_to, keep_s=max(draft.keep_s, self._keep_s)))

    async def _follow(self, model: ServedModel, record: RequestRecordView) -> Reply:
        """A further one: the same request's reply, from its first token."""
        reply = self._reply(model, msgspec.msgpack.decode(record.body, type=InferenceRequest))
        reply.entered = True
        if reply.is_shared:
            self._register(reply)
            if record.finish is not None and not await self._has_stream(reply.request):
                await self._repair(reply)
        return reply

    def _reply(self, model: ServedModel, request: InferenceRequest) -> Reply:
        return Reply(model, request, close=self._close, drain_time_s=self.desk.drain_time_s)

    async def _has_stream(self, request: InferenceRequest) -> bool:
        return bool(await self.pipeline.send(Command(("EXISTS", self.keys.replies(request.reply_to)), int)))

    def _register(self, reply: Reply) -> None:
        """Before the request is in the queue: its first token may come before the enqueue's own answer."""
        if not reply.is_shared:
            self._replies[reply.request.id] = reply
            self._reader.mailboxes[reply.request.id] = reply.mailbox
            return
        self._shared.add(reply)
        stream = self.keys.replies(reply.request.reply_to)
        if self._followed.join(stream, reply.mailbox, partial(self._mend, reply)):
            wake = ("XADD", self._followed.wake_stream, "MAXLEN", 1, "*", "m", b"")
            lease = ("ZADD", self.keys.awaits, time.time() + AWAITED_S, reply.request.id)
            for words in (wake, ("EXPIRE", self._followed.wake_stream, 600), lease):
                self.pipeline.send(Command(words, bytes)).add_done_callback(ignore_lost)

    def _close(self, reply: Reply) -> None:
        """Forget a request; cancel it where it has not ended and nobody else may wait for it."""
        self._forget(reply)
        if not reply.is_shared:
            if reply.finish is None:
                self._spawn(self._cancel(reply.model, reply.request, withdrawn=reply.withdrawn))
        elif reply.finish is not None:
            request = reply.request
            for words in (
                ("EXPIRE", self.keys.replies(request.reply_to), request.keep_s),
                ("ZREM", self.keys.awaits, request.id),
            ):
                self.pipeline.send(Command(words, int)).add_done_callback(ignore_lost)

    def _forget(self, reply: Reply) -> None:
        if reply.is_shared:
            self._shared.discard(reply)
            self._followed.leave(self.keys.replies(reply.request.reply_to), reply.mailbox)
        else:
            self._replies.pop(reply.request.id, None)
            self._reader.mailboxes.pop(reply.request.id, None)

    def _all_replies(self) -> list[Reply]:
        return [*self._replies.values(), *self._shared]

    def give_back(self, drafts: Sequence[Draft]) -> None:
        """Refund answers that were charged with another one and are not let in after all. Returns at once."""
        if drafts:
            self._spawn(self._give_back(drafts))

    async def _give_back(self, drafts: Sequence[Draft]) -> None:
        limits = self.desk.limits
        commands = [limits.cancel_charge(one.tenant.name, one.id, tokens=one.num_tokens) for one in drafts]
        with contextlib.suppress(RedisUnavailable):  # then their slots are freed as lost ones
            await asyncio.gather(*(self.pipeline.send_within(command, PATIENCE_S) for command in commands))

    async def cancel(
        self,
        model: ServedModel,
        request: InferenceRequest,
        *,
        gone: bool = False,
        withdrawn: bool = False,
        token: str = "",
    ) -> str:
        """Cancel one request wherever it is: "queued", "running" or "gone". Raises RedisUnavailable.

        Its client is told, unless it is `gone`. One that is `withdrawn` while it waits does not count against requests
        a minute either. Whoever tries again after RedisUnavailable does so under the same `token`.
        """
        answer = await self.pipeline.send(model.queue.cancel(request.id, token))
        if answer.status == "running":
            return "running"
        record = await self.pipeline.send(model.queue.record(request.id))
        ending: list[Command[Any]] = []
        if answer.status == "queued" or await self._is_owed(request, record):
            attempt = None if gone or record is None else record.attempt
            ending = end_cancelled(self.keys, request, attempt=attempt, withdrawn=withdrawn)
        elif record is None:  # it never came into the queue
            ending = [settle_cancelled(self.keys, request, withdrawn=withdrawn)]
        await asyncio.gather(*(self.pipeline.send_within(command, 30.0) for command in ending))
        return str(answer.status)

    async def _is_owed(self, request: InferenceRequest, record: RequestRecordView | None) -> bool:
        """Of one that is gone: whether it left the queue by a cancel that broke off before its end was told.

        What a worker ended, it settles by what was really used; that may be still to come.
        """
        if record is None or record.state != "cancelled" or record.finish is not None:
            return False
        return await self.pipeline.send(self.desk.limits.holds(request.tenant, request.id))

    async def _cancel(self, model: ServedModel, request: InferenceRequest, *, withdrawn: bool = False) -> None:
        """`cancel` for a client that has left, which keeps trying while Redis is away."""
        deadline, token = time.monotonic() + PATIENCE_S, uuid.uuid4().hex
        while time.monotonic() < deadline:
            try:
                await self.cancel(model, request, gone=True, withdrawn=withdrawn, token=token)
                return
            except RedisUnavailable:
                await asyncio.sleep(0.25)
        log.error("Request %s could not be cancelled: Redis stayed away", request.id)

    # Replies that lost something on the way

    def _on_gap(self, request_id: str) -> None:
        reply = self._replies.get(request_id)
        if reply is not None:
            self._mend(reply)

    def _mend(self, reply: Reply) -> None:
        if reply.entered and not reply.mailbox.repairing:
            reply.mailbox.repairing = True
            self._spawn(self._repair(reply))

    def _on_return(self) -> None:
        for reply in self._all_replies():
            self._mend(reply)

    async def _repair(self, reply: Reply) -> None:
        """Take what is missing from the request's record; end the reply where that is lost too."""
        try:
            update = await read_missing(self.pipeline, reply.model, reply.request)
            if update is None:
                reply.mailbox.fail(RequestLost())
            else:
                reply.mailbox.put(update, asyncio.get_running_loop().time())
        except RedisUnavailable:
            log.debug("Request %s is looked up again once Redis is back", reply.request.id)
        finally:
            reply.mailbox.repairing = False

    # Loops

    async def _repeat(self, work: Callable[[], Awaitable[None]], period_s: float) -> None:
        """Do something for ever; no failure ends it."""
        while True:
            try:
                await work()
            except RedisUnavailable:
                log.debug("Redis is away")
            except Exception:
                log.exception("%s failed", work)
            await asyncio.sleep(period_s)

    async def _watch_fleet(self) -> None:
        self._look_at_idle_replies()
        if self.models.is_stale(self.directory.deployments):
            await self.models.refresh(self.directory.deployments)
        await self.monitor.tick(self.models.loaded())

    def _look_at_idle_replies(self) -> None:
        now = asyncio.get_running_loop().time()
        for reply in self._all_replies():
            mailbox = reply.mailbox
            silent_s = now - mailbox.heard_s
            if silent_s >= (STALLED_S if mailbox.num_tokens else STALLED_UNHEARD_S) and self.pipeline.connected:
                mailbox.heard_s = now
                self._mend(reply)
            if now - mailbox.shown_s >= SIGN_OF_LIFE_S:
                mailbox.shown_s = now
                mailbox.idle = True
                mailbox.wake()

    async def _beat(self) -> None:
        now = await self.pipeline.send(TIME)
        await self.pipeline.send(Command(("ZADD", self.keys.webs, now + HEARTBEAT_LIFE_S, self.name), int))
        awaited = {reply.request.id for reply in self._shared if reply.finish is None}
        if awaited:
            words = [word for request_id in awaited for word in (now + AWAITED_S, request_id)]
            await self.pipeline.send(Command(("ZADD", self.keys.awaits, *words), int))

    def status(self, model: str) -> FleetStatus:
        """Queue, replicas and backpressure of a model as last read."""
        return self.monitor.status(model)

    def find_model(self, name: str) -> ServedModel:
        """Raises ModelNotFound or ModelUnavailable."""
        return self.models.find(name)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)


def _as_is(reply: Any, **_: Any) -> Any:
    return reply
