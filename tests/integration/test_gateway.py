"""The gateway and the application of `/v1` in this process: what is too slow or too fast to meet from outside."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis.asyncio

from controlplane.api.openai import exchange
from controlplane.api.openai.app import OpenAIApp
from inference.directory import TenantConfig
from inference.gateway import gateway as module
from inference.gateway import idempotency
from inference.gateway.choices import submit_choices
from inference.gateway.errors import InvalidRequest, Overloaded, QueueFull, RateLimited
from inference.gateway.gateway import Gateway
from inference.gateway.idempotency import IdempotencyKey
from inference.messages import Finish, InferenceRequest, SequenceUpdate
from inference.worker import outbox
from scheduling.core.policies import build_policy
from scheduling.keys import Keys
from scheduling.store import Command, aexecute, connect
from scheduling.switch import switch_policy
from tests.integration.gateway_support import KEY, draft, open_gateway
from tests.patience import PATIENCE_S, until

QUEUE_LIMIT = 20


@pytest.fixture
async def gateway(redis_url: str, keys: Keys, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, keys, tmp_path, queue_limit=QUEUE_LIMIT) as gateway:
        yield gateway


@dataclass(slots=True)
class Connection:
    """A client of the application: its request, and what it is sent."""

    gateway: Gateway
    body: dict[str, Any]
    part: bytes | None = None
    """Sent in place of the body, and nothing after it."""
    sent: list[bytes] = field(default_factory=list)
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    asked: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self) -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"authorization", f"Bearer {KEY}".encode())],
            "state": {"gateway": self.gateway},
        }
        await OpenAIApp(2**20)(scope, self.receive, self.send)

    async def receive(self) -> MutableMapping[str, Any]:
        is_first, self.asked = not self.asked, True
        if is_first and self.part is None:
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        if is_first and self.part:
            return {"type": "http.request", "body": self.part, "more_body": True}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        async with self.changed:
            self.status = message.get("status", self.status)
            self.headers |= dict(message.get("headers", []))
            self.sent.append(message.get("body", b""))
            self.changed.notify_all()

    async def wait_for(self, part: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: part in b"".join(self.sent))


async def test_an_idle_stream_gets_signs_of_life(
    redis_url: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of them, so that what waits is looked up before a sign of life is due, as it is in earnest.
    for name in ("SIGN_OF_LIFE_S", "STALLED_S", "STALLED_UNHEARD_S", "PERIOD_S"):
        monkeypatch.setattr(module, name, getattr(module, name) / 20)
    async with open_gateway(redis_url, keys, tmp_path) as gateway:
        connection = Connection(gateway, {"model": "tiny", "prompt": "ba", "stream": True})
        task = asyncio.create_task(connection.run())
        await connection.wait_for(b": keep-alive\n\n: keep-alive\n\n")
        connection.gone.set()
        await asyncio.wait_for(task, PATIENCE_S)
        assert gateway.num_replies == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_has_its_request_cancelled_without_waiting_for_any_period(
    redis_url: str,
    keys: Keys,
    tmp_path: Path,
    astore: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    for name in ("PERIOD_S", "HEARTBEAT_S"):
        monkeypatch.setattr(module, name, 10 * PATIENCE_S)
    async with open_gateway(redis_url, keys, tmp_path) as gateway:
        connections = [Connection(gateway, {"model": "tiny", "prompt": "ba", "stream": stream}) for _ in range(2)]
        tasks = [asyncio.create_task(connection.run()) for connection in connections]
        queue = gateway.find_model("tiny").queue

        async def depth() -> int:
            return (await aexecute(astore, queue.snapshot())).depth

        await until_is(depth, 2)
        (claimed,) = (await aexecute(astore, queue.claim("gpu", max_requests=1, max_tokens=99, lease_s=60))).requests
        for connection in connections:
            connection.gone.set()
        await until_is(depth, 0)

        async def is_told() -> bool:
            return await aexecute(astore, queue.take_cancels("gpu")) == [claimed.id]

        await until(is_told)
        await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
    assert outbox.CANCELS_PERIOD_S <= 0.5, "how often its worker asks"


async def test_a_request_placed_under_an_old_revision_is_placed_again(
    gateway: Gateway, redis_url: str, astore: redis.asyncio.Redis
) -> None:
    queue = gateway.find_model("tiny").queue
    await gateway.submit(draft(gateway, 1))
    with connect(redis_url) as client:
        switch_policy(client, queue, build_policy("fair"), 7)
    await gateway.submit(draft(gateway, 2))
    snapshot = await aexecute(astore, queue.snapshot())
    assert (snapshot.depth, snapshot.revision) == (2, 7)
    position = await aexecute(astore, queue.position("cmpl-2"))
    assert position is not None
    assert (position.flow, position.in_flow) == ("alpha", 1)


async def test_each_priority_has_its_own_bound_on_the_queue(gateway: Gateway, astore: redis.asyncio.Redis) -> None:
    refused: dict[int, int] = {}
    waits: list[float] = []
    for number in range(QUEUE_LIMIT * 6):
        priority = 5 - number // QUEUE_LIMIT
        try:
            await gateway.submit(draft(gateway, number, priority))
        except (QueueFull, Overloaded) as error:
            waits.append(error.retry_after_s or 0.0)
            refused.setdefault(priority, (await aexecute(astore, draft(gateway, 0).model.queue.snapshot())).depth)
    assert min(waits) >= 1
    # Those of higher priority come in for those of lower ones; twenty critical ones for all others.
    assert refused == {5: 10, 4: 14, 3: 17, 2: 19}
    await until_is(lambda: running(gateway, astore), QUEUE_LIMIT)


async def test_who_is_refused_by_the_bound_on_tokens_is_told_so_and_comes_again_when_they_have_drained(
    redis_url: str, keys: Keys, tmp_path: Path, astore: redis.asyncio.Redis
) -> None:
    async with open_gateway(redis_url, keys, tmp_path, queue_limit=QUEUE_LIMIT, queue_tokens=30) as gateway:
        for number in range(4):
            await gateway.submit(draft(gateway, number))
        with pytest.raises(QueueFull, match=r"Requests of 28 tokens .* above the bound of 30") as refused:
            await gateway.submit(draft(gateway, 4))
        assert refused.value.retry_after_s == 31, "nothing has drained yet"
        rate = gateway.status("tiny").rate
        for second in range(3):
            rate.update(second, 100 * second, second)
        with pytest.raises(QueueFull) as again:
            await gateway.submit(draft(gateway, 5))
        assert again.value.retry_after_s == 6, "five tokens too many at one a second, and one for the level to fall"


async def running(gateway: Gateway, astore: redis.asyncio.Redis, tenant: str = "alpha") -> int:
    return (await aexecute(astore, gateway.desk.limits.usage(tenant))).running


async def until_is(read: Callable[[], Awaitable[int]], expected: int) -> None:
    async def is_so() -> bool:
        return await read() == expected

    await until(is_so)


async def test_who_has_to_go_for_a_higher_priority_is_told_at_once_and_its_limits_are_settled(
    gateway: Gateway, astore: redis.asyncio.Redis, keys: Keys
) -> None:
    replies = [await gateway.submit(draft(gateway, number, 4)) for number in range(14)]
    critical = await gateway.submit(draft(gateway, 100, 0))
    async with asyncio.timeout(PATIENCE_S):
        for number in range(101, 107):
            await gateway.submit(draft(gateway, number, 0))
        # Six fit; the queue's bound is 20, so the seventh goes in for the latest of the lowest.
        await replies[-1].read_all()
    finish = replies[-1].finish
    assert finish is not None
    assert (finish.reason, finish.error_code) == ("error", "shed")
    assert critical.finish is replies[0].finish is replies[-2].finish is None
    await until_is(lambda: running(gateway, astore), QUEUE_LIMIT)
    record = await aexecute(astore, replies[-1].model.queue.record("cmpl-13"))
    assert record is not None
    assert (record.state, record.finish is not None) == ("failed", True)
    entries: list[Any] = await astore.xrange(keys.history) or []
    events = [event for _, fields in entries for event in msgspec.msgpack.decode(fields[b"m"])]
    assert [(event["id"], event["error_code"]) for event in events] == [("cmpl-13", "shed")]


async def test_a_tenants_day_is_over_when_its_tokens_are_spent(gateway: Gateway) -> None:
    frugal = TenantConfig(name="frugal", max_priority=0, tpd=20)
    for number in range(2):
        await gateway.submit(replace(draft(gateway, number), tenant=frugal))
    with pytest.raises(RateLimited, match="today's 20 tokens") as refused:
        await gateway.submit(replace(draft(gateway, 2), tenant=frugal))
    assert refused.value.code == "tokens_per_day_exceeded"
    assert 0 < (refused.value.retry_after_s or 0) <= 86_400
    with pytest.raises(InvalidRequest, match="20 tokens per day"):
        await gateway.submit(replace(draft(gateway, 3), tenant=frugal, max_tokens=19))


async def test_who_cancels_what_a_worker_has_just_ended_is_not_given_back_what_it_used(
    gateway: Gateway, astore: redis.asyncio.Redis
) -> None:
    frugal = TenantConfig(name="frugal", max_priority=0, tpd=7)
    reply = await gateway.submit(replace(draft(gateway, 0), tenant=frugal))
    queue = reply.model.queue
    (claimed,) = (await aexecute(astore, queue.claim("gpu", max_requests=1, max_tokens=99, lease_s=5))).requests
    assert await aexecute(
        astore,
        queue.finish("gpu", claimed.id, claimed.attempt, state="done", used_tokens=7, finish=b"\x01", output="ba"),
    )
    assert await gateway.cancel(reply.model, reply.request) == "gone"
    await aexecute(astore, gateway.desk.limits.settle("frugal", reply.request.id, refund_tokens=0))  # as its worker
    with pytest.raises(RateLimited, match="today's 7 tokens"):
        await gateway.submit(replace(draft(gateway, 1), tenant=frugal))


async def test_several_answers_of_which_one_is_refused_cost_nothing(
    gateway: Gateway, astore: redis.asyncio.Redis
) -> None:
    few = TenantConfig(name="few", max_priority=0, rpm=5)
    await gateway.submit(replace(draft(gateway, 9), tenant=few))
    with pytest.raises(RateLimited, match="5 requests per minute"):
        await submit_choices(gateway, [replace(draft(gateway, number), tenant=few) for number in range(5)], None)

    async def left() -> int:
        return (await aexecute(astore, gateway.desk.limits.usage("few"))).remaining_requests or 0

    await until_is(left, 4)


async def test_answers_under_a_key_of_which_one_was_refused_are_let_in_at_the_next_try(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "ABANDONED_S", 10 * PATIENCE_S)
    few, key = TenantConfig(name="few", max_priority=0, rpm=5), IdempotencyKey("digest", "fingerprint")
    await gateway.submit(replace(draft(gateway, 9), tenant=few))
    drafts = [replace(draft(gateway, number), tenant=few) for number in range(5)]
    with pytest.raises(RateLimited):
        await submit_choices(gateway, drafts, key)
    again = [replace(one, id=f"again-{one.id}", tenant=replace(few, rpm=None)) for one in drafts]
    assert len(await submit_choices(gateway, again, key)) == 5


async def test_an_answer_that_an_earlier_run_of_the_key_gave_is_not_charged_again(
    gateway: Gateway, astore: redis.asyncio.Redis
) -> None:
    few, key = TenantConfig(name="few", max_priority=0, tpd=100), IdempotencyKey("digest", "fingerprint")
    drafts = [replace(draft(gateway, number), tenant=few) for number in range(2)]
    queue = drafts[0].model.queue
    await submit_choices(gateway, drafts, key)
    await aexecute(astore, queue.claim("gpu", max_requests=2, max_tokens=99, lease_s=5))
    for one, state in zip(drafts, ("failed", "finished"), strict=True):
        end = msgspec.msgpack.encode(Finish("error" if state == "failed" else "stop", 2, 5))
        await aexecute(astore, queue.finish("gpu", one.id, 1, state=state, used_tokens=7, finish=end, output=""))
        await aexecute(astore, gateway.desk.limits.settle("few", one.id, refund_tokens=0))
    again = await submit_choices(gateway, [replace(one, id=f"again-{one.id}") for one in drafts], key)
    assert [reply.request.id for reply in again] == ["again-cmpl-0", "cmpl-1"]
    await until_is(lambda: running(gateway, astore, "few"), 1)
    assert await astore.hget(f"{gateway.keys.tenant('few')}:day", "tokens") == b"21"


@pytest.mark.parametrize("part", [b"", b'{"model'])
async def test_a_client_that_does_not_send_its_body_is_told_that_it_took_too_long(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, part: bytes
) -> None:
    monkeypatch.setattr(exchange, "BODY_PATIENCE_S", 0.05)
    connection = Connection(gateway, {}, part=part)
    await asyncio.wait_for(connection.run(), PATIENCE_S)
    assert connection.status == 408
    assert connection.headers[b"connection"] == b"close"
    assert b'"code":"request_timeout"' in b"".join(connection.sent)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_client_of_a_shed_request_is_asked_to_come_again(
    gateway: Gateway, astore: redis.asyncio.Redis, stream: bool
) -> None:
    for number in range(19):
        await gateway.submit(draft(gateway, number, 0))
    connection = Connection(gateway, {"model": "tiny", "prompt": "ba", "priority": "realtime", "stream": stream})
    task = asyncio.create_task(connection.run())
    queue = draft(gateway, 0).model.queue

    async def depth() -> int:
        return (await aexecute(astore, queue.snapshot())).depth

    await until_is(depth, 20)
    await gateway.submit(draft(gateway, 20, 0))
    await connection.wait_for(b'"code":"shed"')
    connection.gone.set()
    await asyncio.wait_for(task, PATIENCE_S)
    assert b"requests of higher priority came" in b"".join(connection.sent)
    assert connection.status == (200 if stream else 503)
    assert stream or int(connection.headers[b"retry-after"]) >= 1


async def test_where_one_of_several_answers_fails_the_others_are_not_waited_for(
    gateway: Gateway, astore: redis.asyncio.Redis
) -> None:
    connection = Connection(gateway, {"model": "tiny", "prompt": "ba", "n": 3})
    task = asyncio.create_task(connection.run())
    queue = draft(gateway, 0).model.queue

    async def depth() -> int:
        return (await aexecute(astore, queue.snapshot())).depth

    await until_is(depth, 3)
    (claimed,) = (await aexecute(astore, queue.claim("gpu", max_requests=1, max_tokens=99, lease_s=5))).requests
    end = SequenceUpdate(claimed.id, claimed.attempt, 0, [], [], Finish("cancelled", 2, 0))
    await astore.xadd(gateway.keys.replies(gateway.name), {"m": msgspec.msgpack.encode([end])})
    await connection.wait_for(b'"code":"cancelled"')
    assert connection.status == 499
    await until_is(depth, 0)
    connection.gone.set()
    await asyncio.wait_for(task, PATIENCE_S)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_waits_hears_at_once_that_another_client_cancelled_the_request(
    gateway: Gateway, redis_url: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(module, "STALLED_UNHEARD_S", 10 * PATIENCE_S)
    connection = Connection(gateway, {"model": "tiny", "prompt": "ba", "stream": stream})
    task = asyncio.create_task(connection.run())
    request = await queued_request(gateway)
    async with open_gateway(redis_url, keys, tmp_path) as other:
        assert await other.cancel(other.find_model("tiny"), request) == "queued"
        await connection.wait_for(b'"code":"cancelled"')
        assert await other.cancel(other.find_model("tiny"), request) == "gone"
    assert connection.status == (200 if stream else 499)
    connection.gone.set()
    await asyncio.wait_for(task, PATIENCE_S)


async def test_a_request_whose_canceller_died_before_it_told_the_client_ends_as_cancelled(
    gateway: Gateway, astore: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALLED_UNHEARD_S", 0.1)
    connection = Connection(gateway, {"model": "tiny", "prompt": "ba"})
    task = asyncio.create_task(connection.run())
    request = await queued_request(gateway)
    await aexecute(astore, gateway.find_model("tiny").queue.cancel(request.id))
    await connection.wait_for(b'"code":"cancelled"')
    assert connection.status == 499
    connection.gone.set()
    await asyncio.wait_for(task, PATIENCE_S)


async def queued_request(gateway: Gateway) -> InferenceRequest:
    """The only one, once it is in the queue."""
    queue = gateway.find_model("tiny").queue

    async def find() -> list[str]:
        return await gateway.pipeline.send(queue.reply_to_requests(gateway.name))

    await until(find)
    record = await gateway.pipeline.send(queue.record((await find())[0]))
    assert record is not None
    return msgspec.msgpack.decode(record.body, type=InferenceRequest)


async def test_concurrent_commands_share_round_trips(gateway: Gateway, astore: redis.asyncio.Redis) -> None:
    async def num_reads() -> int:
        return int((await astore.info("stats"))["total_reads_processed"])

    before = await num_reads()
    answers = await asyncio.gather(*(gateway.pipeline.send(Command(("PING",), bool)) for _ in range(200)))
    assert answers == [True] * 200
    assert await num_reads() - before < 20


async def test_a_script_that_redis_forgot_is_loaded_again(gateway: Gateway, astore: redis.asyncio.Redis) -> None:
    await gateway.submit(draft(gateway, 1))
    await astore.script_flush()
    await asyncio.gather(*(gateway.submit(draft(gateway, number)) for number in range(2, 8)))
    assert gateway.num_replies == 7


async def test_what_is_abandoned_leaves_nothing_behind(gateway: Gateway, astore: redis.asyncio.Redis) -> None:
    replies = [await gateway.submit(draft(gateway, number)) for number in range(5)]
    for reply in replies:
        reply.abandon()
        reply.abandon()
    model = gateway.find_model("tiny")

    async def is_empty() -> bool:
        usage = await aexecute(astore, gateway.desk.limits.usage("alpha"))
        return (await aexecute(astore, model.queue.snapshot())).depth == 0 and usage.running == 0

    await until(is_empty)
    assert gateway.num_replies == 0
