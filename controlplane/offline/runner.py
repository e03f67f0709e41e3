"""Sends the requests of batches through a gateway of its own, a few at a time, and collects their answers."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import replace
from typing import Any

import msgspec
import redis.asyncio
from channels.db import database_sync_to_async
from django.db import Error as DatabaseError
from django.utils import timezone
from redis.exceptions import RedisError

from controlplane.api.caller import Caller
from controlplane.api.drafting import draft_chat, draft_completion
from controlplane.api.errors import error_body, status_of
from controlplane.api.openai.body import NOT_JSON, ChatBody, CompletionBody, read_body
from controlplane.api.sampling import refuse_what_polling_lacks
from controlplane.config import Config
from controlplane.models import Batch, BatchLine
from controlplane.offline import GATEWAY_PREFIX
from controlplane.offline.batches import end_batch, reach, read_lines
from controlplane.offline.files import ACTIVE
from controlplane.offline.room import MOST, offline_room
from controlplane.offline.turns import in_turn
from inference.directory import DirectoryWatch, KeyConfig
from inference.gateway.admission import Draft
from inference.gateway.errors import (
    GatewayError,
    InvalidRequest,
    NoReplica,
    Overloaded,
    QueueFull,
    RateLimited,
    RedisUnavailable,
    RequestEnded,
    Shed,
)
from inference.gateway.gateway import Gateway
from inference.gateway.served import ServedModel
from inference.messages import Finish, InferenceRequest
from scheduling.core.request import Priority
from scheduling.fleet import RequestRecordView
from scheduling.keys import Keys

log = logging.getLogger(__name__)

STEP_S = 0.8
ROUND_S = 0.1
"""How often answers are collected and room is filled again."""
REST_S = 30.0
"""How long a batch is left alone that nothing can be done with, for a reason that nobody thought of."""
KEEP_S = 86_400
"""How long an answer waits to be collected."""
PASSING = (429, 500, 502, 503)
"""Refusals after which a request is tried again."""


class OfflineRunner:
    """Steps once a second. All that it knows is in the database and in Redis, so it may die at any time."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._turn = 0
        self._resting: dict[str, float] = {}
        """Batches that are left alone, and until when (monotonic)."""
        self._refused: dict[str, float] = {}
        """Tenants who have to come again, and when: each refusal is counted, and asking at once changes nothing."""

    async def step(self) -> None:
        """Move every batch on, round after round, until the next step is due."""
        end_s = time.monotonic() + STEP_S
        while (batches := await self._load()) and time.monotonic() < end_s:
            await self._round(batches)
            await asyncio.sleep(ROUND_S)

    async def _round(self, batches: list[Batch]) -> None:
        self._turn += 1
        now_s = time.monotonic()
        for waits in (self._resting, self._refused):
            for name in [name for name, until_s in waits.items() if until_s <= now_s]:
                del waits[name]
        for batch in in_turn(batches, self._turn):
            if batch.id in self._resting:
                continue
            try:
                await self._move(batch)
            except (RedisUnavailable, RedisError, DatabaseError, OSError):  # an outage, which passes and is everybody's
                raise
            except Exception:
                log.exception("Batch %s cannot go on; the others do.", batch.id)
                self._resting[batch.id] = now_s + REST_S

    async def _move(self, batch: Batch) -> None:
        if batch.status == Batch.Status.VALIDATING:
            await database_sync_to_async(read_lines)(batch)
        elif batch.status == Batch.Status.FINALIZING:
            await database_sync_to_async(end_batch)(batch, Batch.Status.COMPLETED)
        else:
            await self._advance(batch)

    async def _load(self) -> list[Batch]:
        rows = Batch.objects.filter(status__in=ACTIVE).order_by("created_at")
        return await database_sync_to_async(lambda: list(rows))()  # type: ignore[no-any-return]

    async def _advance(self, batch: Batch) -> None:
        for line in await self._lines(batch, BatchLine.State.SUBMITTED):
            await self._collect(batch, line)
        ends = batch.status == Batch.Status.CANCELLING or batch.expires_at <= timezone.now()
        if ends:
            await self._stop(batch)
            return
        num_running = await self._count(BatchLine.State.SUBMITTED)
        tenant = self._gateway.directory.tenants.get(batch.tenant)
        if tenant is not None and tenant.suspended:
            return  # it goes on when its tenant may, unless its time runs out before
        pending = await self._lines(batch, BatchLine.State.PENDING, MOST)
        for line in pending:
            room = offline_room(self._gateway.status(_model_of(line)))
            if num_running >= room or self._refused.get(batch.tenant, 0.0) > time.monotonic():
                break
            num_running += await self._submit(batch, line)
        if not pending and not await self._lines(batch, BatchLine.State.SUBMITTED, 1):
            await database_sync_to_async(reach)(batch, Batch.Status.FINALIZING)

    async def _stop(self, batch: Batch) -> None:
        """Take out what has not ended; it ends with the batch."""
        for line in await self._lines(batch, BatchLine.State.SUBMITTED):
            found = await self._find(line)
            if found is not None and found[1].finish is None:
                await self._gateway.cancel(found[0], msgspec.msgpack.decode(found[1].body, type=InferenceRequest))
        cancelled = batch.status == Batch.Status.CANCELLING
        await database_sync_to_async(end_batch)(batch, Batch.Status.CANCELLED if cancelled else Batch.Status.EXPIRED)

    async def _submit(self, batch: Batch, line: BatchLine) -> int:
        """Put a request into the queue: 1 where it is there now, 0 where it has failed or has to wait."""
        if line.state == BatchLine.State.PENDING and await self._find(line) is not None:
            await self._save(line, BatchLine.State.SUBMITTED)  # put there before this process was started again
            return 1
        try:
            draft = await self._draft(batch, line)
            await self._gateway.submit(replace(draft, keep_s=KEEP_S, comes_again=True))
        except RequestEnded:
            return 0  # its end is collected at the next step
        except GatewayError as error:
            if status_of(error) not in PASSING:
                await self._fail(line, error)
            elif isinstance(error, RateLimited | NoReplica | Overloaded | QueueFull):
                self._refused[batch.tenant] = time.monotonic() + min(REST_S, error.retry_after_s or 1.0)
            return 0
        await self._save(line, BatchLine.State.SUBMITTED)
        return 1

    async def _draft(self, batch: Batch, line: BatchLine) -> Draft:
        tenant = self._gateway.directory.tenants.get(batch.tenant)
        if tenant is None:
            raise InvalidRequest("The tenant is no more.", code="tenant_not_found")
        caller = Caller(KeyConfig(prefix="batch", digest="", tenant=tenant.name, max_priority=Priority.BULK), tenant)
        raw = line.body.encode()
        body: ChatBody | CompletionBody
        chats = batch.endpoint == "/v1/chat/completions"
        body = read_body(raw, ChatBody) if chats else read_body(raw, CompletionBody)
        if body.stream:
            raise InvalidRequest("A request of a batch cannot stream.", param="stream")
        refuse_what_polling_lacks(body)
        model = self._gateway.find_model(body.model)
        if isinstance(body, ChatBody):
            return await draft_chat(body, caller, model, line.request_id)
        return await draft_completion(body, caller, model, line.request_id)

    async def _collect(self, batch: Batch, line: BatchLine) -> None:
        """Take an answer that is there. A request that Redis lost is sent again."""
        found = await self._find(line)
        if found is None:
            await self._save(line, BatchLine.State.PENDING)
            return
        record = found[1]
        if record.finish is None:
            if record.state == "cancelled":  # by somebody else, while it waited
                await self._fail(line, GatewayError("The request was cancelled.", code="cancelled"))
            return
        finish = msgspec.msgpack.decode(record.finish, type=Finish)
        if finish.error_code == Shed.code:
            rows = BatchLine.objects.filter(pk=line.pk)
            await database_sync_to_async(rows.update)(state=BatchLine.State.PENDING, num_shed=line.num_shed + 1)
            return
        if finish.reason in ("stop", "length"):
            await self._save(line, BatchLine.State.COMPLETED, 200, json.dumps(_body(batch, line, record, finish)))
            return
        message = finish.error_message or f"The request was {finish.reason}."
        await self._fail(line, GatewayError(message, code=finish.error_code or finish.reason))

    async def _find(self, line: BatchLine) -> tuple[ServedModel, RequestRecordView] | None:
        try:
            model = self._gateway.find_model(_model_of(line))
        except GatewayError:
            return None
        record = await self._gateway.pipeline.send(model.queue.record(line.request_id))
        return None if record is None else (model, record)

    async def _fail(self, line: BatchLine, error: GatewayError) -> None:
        await self._save(line, BatchLine.State.FAILED, status_of(error), error_body(error).decode())

    async def _save(self, line: BatchLine, state: BatchLine.State, status_code: int = 0, answer: str = "") -> None:
        rows = BatchLine.objects.filter(pk=line.pk)
        await database_sync_to_async(rows.update)(state=state, status_code=status_code, answer=answer)

    async def _lines(self, batch: Batch, state: BatchLine.State, limit: int = 1000) -> list[BatchLine]:
        rows = BatchLine.objects.filter(batch=batch, state=state)[:limit]
        return await database_sync_to_async(lambda: list(rows))()  # type: ignore[no-any-return]

    async def _count(self, state: BatchLine.State) -> int:
        return await database_sync_to_async(BatchLine.objects.filter(state=state).count)()  # type: ignore[no-any-return]


class _Asked(msgspec.Struct):
    model: str = ""


def _model_of(line: BatchLine) -> str:
    try:
        return msgspec.json.decode(line.body, type=_Asked).model
    except NOT_JSON:
        return ""


def _body(batch: Batch, line: BatchLine, record: RequestRecordView, finish: Finish) -> dict[str, Any]:
    """The answer as the endpoint itself would have given it."""
    request = msgspec.msgpack.decode(record.body, type=InferenceRequest)
    chats = batch.endpoint == "/v1/chat/completions"
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish.reason}
    choice |= {"message": {"role": "assistant", "content": record.output}} if chats else {"text": record.output}
    total = finish.prompt_tokens + finish.completion_tokens
    return {
        "id": line.request_id,
        "object": "chat.completion" if chats else "text_completion",
        "created": int(request.arrival_s),
        "model": request.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": finish.prompt_tokens,
            "completion_tokens": finish.completion_tokens,
            "total_tokens": total,
        },
    }


class RunnerThread:
    """An event loop of its own in the ops process, which Celery's threads leave steps to."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loop = asyncio.new_event_loop()
        self._runner: OfflineRunner | None = None
        self._busy = threading.Lock()
        threading.Thread(target=self._loop.run_forever, name="offline", daemon=True).start()

    def step(self, timeout_s: float) -> None:
        """One step; nothing where one is under way. Raises what the step raises."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            self._wait(self._step, timeout_s)
        finally:
            self._busy.release()

    def _wait(self, work: Callable[[], Coroutine[Any, Any, None]], timeout_s: float) -> None:
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            future.result(timeout_s)
        except NotInTime:
            future.cancel()
            log.warning("Offline work waits: a step took more than %g s.", timeout_s)

    async def _step(self) -> None:
        if self._runner is None:
            self._runner = OfflineRunner(await self._open())
        await self._runner.step()

    async def _open(self) -> Gateway:
        config, keys = self._config, Keys(prefix=self._config.key_prefix)
        client = redis.asyncio.Redis.from_url(config.redis, socket_timeout=5.0)
        directory = DirectoryWatch(client, keys)
        gateway = Gateway(
            config.redis,
            keys,
            directory,
            name=f"{GATEWAY_PREFIX}{time.time_ns()}",
            queue_limit=config.queue_limit,
            queue_tokens=config.queue_tokens or None,
        )
        await directory.start()
        await gateway.start()
        return gateway
