"""What the gateway lets in: deadlines, models that nobody serves, levels that all web processes share."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
import redis.asyncio

from benchmarks.stack import RedisServer
from controlplane.api.caller import Caller
from controlplane.api.drafting import draft_completion
from controlplane.api.openai.body import CompletionBody
from inference.directory import KeyConfig
from inference.gateway import admission
from inference.gateway.errors import DeadlineExceeded, NoReplica, Overloaded
from inference.gateway.gateway import Gateway
from inference.gateway.served import ServedModel
from inference.messages import ReplicaStatus, SharedLevel
from inference.shedding import end_dropped
from scheduling.core.answers import Shed
from scheduling.core.backpressure import BackpressureLimits, Level
from scheduling.keys import Keys
from scheduling.store import TIME, aexecute, connect
from tests.integration.gateway_support import TENANT, draft, open_gateway
from tests.patience import PATIENCE_S, until, wait_until

MODEL = "tiny"


async def until_read(gateway: Gateway, condition: Callable[[], object]) -> None:
    """Wait for the reading of the queues after which the condition holds."""
    looked, tick = asyncio.Event(), gateway.monitor.tick

    async def tell(models: Sequence[ServedModel]) -> None:
        await tick(models)
        looked.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gateway.monitor, "tick", tell)
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                looked.clear()
                await looked.wait()


async def report(client: redis.asyncio.Redis, keys: Keys, state: str = "ready") -> None:
    """A replica of the model reports."""
    now = time.time()
    status = ReplicaStatus(
        replica="r0", model=MODEL, host="here", pid=1, state=state, time_s=now, started_s=now  # type: ignore[arg-type]
    )  # fmt: skip
    await client.set(keys.replica("r0"), msgspec.msgpack.encode(status), px=3_600_000)
    await client.zadd(keys.replicas, {"r0": now})


async def test_a_model_that_nobody_serves_is_refused_after_a_while_and_what_waits_stays(
    redis_url: str, astore: redis.asyncio.Redis, keys: Keys, tmp_path: Path
) -> None:
    async with open_gateway(redis_url, keys, tmp_path, no_replica_s=3600) as gateway:
        waiting = await gateway.submit(draft(gateway, 1))
        assert gateway.desk.why_unserved(MODEL) == ""
        gateway.desk._no_replica_s = 0.1
        await until_read(gateway, lambda: gateway.desk.why_unserved(MODEL))
        with pytest.raises(NoReplica, match="No worker has served the model 'tiny'") as refused:
            await gateway.submit(draft(gateway, 2))
        assert (refused.value.code, refused.value.retry_after_s) == ("no_replica", 10.0)
        await report(astore, keys, state="failed")
        await gateway.monitor.tick(gateway.models.loaded())
        assert gateway.desk.why_unserved(MODEL), "a replica that failed serves nobody"
        await report(astore, keys)
        await until_read(gateway, lambda: not gateway.desk.why_unserved(MODEL))
        await gateway.submit(draft(gateway, 3))
        assert waiting.finish is None
        assert (await aexecute(astore, waiting.model.queue.snapshot())).depth == 2
        usage = await aexecute(astore, gateway.desk.limits.usage("alpha"))
        assert usage.running == 2


async def test_a_redis_that_comes_back_soon_refuses_nobody(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "REDIS_WAIT_S", PATIENCE_S)
    with TemporaryDirectory(prefix="psr-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            async with open_gateway(server.url, keys, tmp_path) as gateway:
                await gateway.submit(draft(gateway, 1))
                server.stop()
                limited = replace(TENANT, name="beta", rpm=9)
                coming = [gateway.submit(draft(gateway, 2)), gateway.submit(draft(gateway, 3, tenant=limited))]
                submitted = asyncio.gather(*coming)
                await asyncio.to_thread(wait_until, lambda: not gateway.pipeline.connected)
                await asyncio.to_thread(server.start)
                await submitted
                assert (await gateway.pipeline.send(gateway.find_model(MODEL).queue.snapshot())).depth == 3
                usage = [gateway.pipeline.send(gateway.desk.limits.usage(tenant)) for tenant in ("alpha", "beta")]
                assert [used.running for used in await asyncio.gather(*usage)] == [2, 1]
        finally:
            server.stop()


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


async def test_a_request_that_names_no_deadline_has_that_of_its_tenants_service_level(
    redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    caller = Caller(
        KeyConfig(prefix="k", digest="", tenant="alpha", max_priority=0), replace(TENANT, deadlines_s={3: 20.0})
    )
    asked: list[tuple[dict[str, Any], float | None]] = [
        ({}, 20.0), ({"deadline_ms": 3000}, 3.0), ({"priority": "low"}, None)
    ]  # fmt: skip
    async with open_gateway(redis_url, keys, tmp_path) as gateway:
        for fields, within_s in asked:
            body = CompletionBody(model=MODEL, prompt=[10, 11], max_tokens=5, **fields)
            began_s = time.time()
            made = await draft_completion(body, caller, gateway.find_model(MODEL), "cmpl-1")
            assert (made.deadline_s is None) == (within_s is None)
            if made.deadline_s is not None and within_s is not None:
                assert began_s + within_s <= made.deadline_s <= time.time() + within_s


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
        await until_read(other, lambda: other.status(MODEL).assessment.level == Level.MEDIUM)
        for reply in replies:
            reply.abandon()
        await until_read(one, lambda: one.status(MODEL).assessment.level == Level.NONE)
        await until_read(other, lambda: other.status(MODEL).assessment.level == Level.NONE)


async def test_what_another_process_measured_refuses_here_too_for_as_long_as_it_holds(
    redis_url: str, astore: redis.asyncio.Redis, keys: Keys, tmp_path: Path
) -> None:
    limits = BackpressureLimits(wait_s=(1e9, 1e9, 1e9, 1e9), hold_s=600)
    async with open_gateway(redis_url, keys, tmp_path, backpressure=limits) as gateway:

        async def share(called_s: float) -> None:
            theirs = SharedLevel(int(Level.HIGH), "estimated wait 200 s", called_s, time.time())
            await astore.hset(keys.backpressure, MODEL, msgspec.msgpack.encode(theirs))

        await share(time.time())
        await until_read(gateway, lambda: gateway.status(MODEL).assessment.level == Level.HIGH)
        with pytest.raises(Overloaded, match="estimated wait 200 s"):
            await gateway.submit(draft(gateway, 1, 3))
        await gateway.pipeline.send(TIME)  # after the counts
        assert await astore.hgetall(keys.turned_away) == {b"tiny|alpha|3": b"1"}
        await gateway.monitor.tick(gateway.models.loaded())
        assert gateway.status(MODEL).assessment.level == Level.HIGH, "it holds"

        async def is_over() -> bool:
            await share(time.time() - 601)
            await gateway.monitor.tick(gateway.models.loaded())
            return gateway.status(MODEL).assessment.level == Level.NONE

        await until(is_over)
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
        await asyncio.wait_for(reply.read_all(), PATIENCE_S)
        assert reply.finish is not None
        assert (reply.finish.reason, reply.finish.error_code) == ("error", "deadline_exceeded")
        assert await astore.hgetall(keys.refusals) == {b"tiny|alpha|deadline_exceeded": b"1"}
        assert (await aexecute(astore, gateway.desk.limits.usage("alpha"))).running == 0
