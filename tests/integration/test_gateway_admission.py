"""What the gateway lets in: deadlines, models that nobody serves, levels that all web processes share."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import redis.asyncio

from inference.gateway.errors import DeadlineExceeded, NoReplica, Overloaded
from inference.messages import ReplicaStatus, SharedLevel
from inference.shedding import end_dropped
from scheduling.core.answers import Shed
from scheduling.core.backpressure import BackpressureLimits, Level
from scheduling.keys import Keys
from scheduling.store import aexecute, connect
from tests.integration.gateway_support import TENANT, draft, open_gateway

MODEL = "tiny"


async def until(condition: Callable[[], object], patience_s: float = 5.0) -> None:
    async with asyncio.timeout(patience_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def report(client: redis.asyncio.Redis, keys: Keys, state: str = "ready") -> None:
    """A replica of the model reports."""
    now = time.time()
    status = ReplicaStatus(
        replica="r0", model=MODEL, host="here", pid=1, state=state, time_s=now, started_s=now  # type: ignore[arg-type]
    )  # fmt: skip
    await client.set(keys.replica("r0"), msgspec.msgpack.encode(status), px=2000)
    await client.zadd(keys.replicas, {"r0": now})


async def test_a_model_that_nobody_serves_is_refused_after_a_while_and_what_waits_stays(
    redis_url: str, astore: redis.asyncio.Redis, keys: Keys, tmp_path: Path
) -> None:
    async with open_gateway(redis_url, keys, tmp_path, no_replica_s=0.6) as gateway:
        waiting = await gateway.submit(draft(gateway, 1))
        assert gateway.desk.why_unserved(MODEL) == ""
        await until(lambda: gateway.desk.why_unserved(MODEL))
        with pytest.raises(NoReplica, match="No worker has served the model 'tiny'") as refused:
            await gateway.submit(draft(gateway, 2))
        assert (refused.value.code, refused.value.retry_after_s) == ("no_replica", 10.0)
        await report(astore, keys, state="failed")
        await asyncio.wait_for(gateway.monitor.tick(gateway.models.loaded()), 5)
        assert gateway.desk.why_unserved(MODEL), "a replica that failed serves nobody"
        await report(astore, keys)
        await until(lambda: not gateway.desk.why_unserved(MODEL))
        await gateway.submit(draft(gateway, 3))
        assert waiting.finish is None
        assert (await aexecute(astore, waiting.model.queue.snapshot())).depth == 2
        usage = await aexecute(astore, gateway.desk.limits.usage("alpha"))
        assert usage.running == 2


async def test_an_expired_request_is_refused_where_its_tenant_wants_that(
    redis_url: str, astore: redis.asyncio.Redis, keys: Keys, tmp_path: Path
) -> None:
    past = time.time() - 1
    async with open_gateway(redis_url, keys, tmp_path) as gateway:
        await gateway.submit(draft(gateway, 1, deadline_s=past))
        with pytest.raises(DeadlineExceeded):
            await gateway.submit(draft(gateway, 2, deadline_s=past, tenant=replace(TENANT, drop_expired=True)))
        assert (await aexecute(astore, gateway.find_model(MODEL).queue.snapshot())).depth == 1
        assert (await aexecute(astore, gateway.desk.limits.usage("alpha"))).running == 1


async def test_a_level_rises_with_the_request_that_calls_for_it_and_everywhere_soon_after(
    redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(open_gateway(redis_url, keys, tmp_path, queue_limit=20)) for _ in range(2)
        ]
        replies = [await one.submit(draft(one, number, 0)) for number in range(13)]
        assert one.status(MODEL).assessment.level == Level.LOW
        replies.append(await one.submit(draft(one, 13, 0)))
        assert one.status(MODEL).assessment.level == Level.MEDIUM, "at once, without waiting for a reading"
        await until(lambda: other.status(MODEL).assessment.level == Level.MEDIUM)
        for reply in replies:
            reply.abandon()
        await until(lambda: one.status(MODEL).assessment.level == other.status(MODEL).assessment.level == Level.NONE)


async def test_what_another_process_measured_refuses_here_too_for_as_long_as_it_holds(
    redis_url: str, astore: redis.asyncio.Redis, keys: Keys, tmp_path: Path
) -> None:
    async with open_gateway(redis_url, keys, tmp_path) as gateway:
        now = time.time()
        theirs = SharedLevel(int(Level.HIGH), "estimated wait 200 s", now, now)
        await astore.hset(keys.backpressure, MODEL, msgspec.msgpack.encode(theirs))
        await until(lambda: gateway.status(MODEL).assessment.level == Level.HIGH)
        with pytest.raises(Overloaded, match="estimated wait 200 s"):
            await gateway.submit(draft(gateway, 1, 3))
        await until(lambda: gateway.status(MODEL).assessment.level == Level.NONE)
        assert time.time() - now >= BackpressureLimits().hold_s
        await gateway.submit(draft(gateway, 2, 3))


async def test_the_client_of_a_dropped_request_hears_that_its_deadline_passed(
    redis_url: str, astore: redis.asyncio.Redis, keys: Keys, tmp_path: Path
) -> None:
    async with open_gateway(redis_url, keys, tmp_path) as gateway:
        reply = await gateway.submit(draft(gateway, 1, deadline_s=time.time() + 9))
        queue = reply.model.queue
        record = await aexecute(astore, queue.record("cmpl-1"))
        assert record is not None
        await astore.zadd(f"{queue.base}:shed", {"cmpl-1": time.time()})
        with connect(redis_url) as client:
            for _ in range(2):
                end_dropped(client, queue, [Shed("cmpl-1", record.body, "deadline_exceeded")])
        await asyncio.wait_for(reply.read_all(), 5)
        assert reply.finish is not None
        assert (reply.finish.reason, reply.finish.error_code) == ("error", "deadline_exceeded")
        assert await astore.hgetall(keys.refusals) == {b"tiny|alpha|deadline_exceeded": b"1"}
        assert (await aexecute(astore, gateway.desk.limits.usage("alpha"))).running == 0
