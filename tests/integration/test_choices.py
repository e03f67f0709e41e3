"""Several answers to one request are charged as one: all of them or none, and given back where they are not let in."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import redis.asyncio

from inference.directory import TenantConfig
from inference.gateway.choices import submit_choices
from inference.gateway.errors import InvalidRequest, QueueFull, RateLimited
from inference.gateway.gateway import Gateway
from scheduling.keys import Keys
from scheduling.limits import TenantLimits, TenantUsage
from scheduling.store import aexecute, execute
from tests.integration.gateway_support import draft, open_gateway
from tests.patience import until

TENANT = TenantConfig(name="few", max_priority=0, rpm=8, tpm=1000, concurrency=6)
QUEUE_LIMIT = 4


@pytest.fixture
async def gateway(redis_url: str, keys: Keys, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with open_gateway(redis_url, keys, tmp_path, queue_limit=QUEUE_LIMIT) as opened:
        yield opened


def test_answers_are_charged_together_or_not_at_all(store: redis.Redis, keys: Keys) -> None:
    limits = TenantLimits(keys)

    def ask(name: str, num: int) -> str:
        command = limits.acquire(
            "ada", name, rpm=8, tpm=100, concurrency=6, tpd=90, tokens=10 * num, now=0.0,
            others=[f"{name}-{i}" for i in range(1, num)],
        )  # fmt: skip
        return execute(store, command).reason

    def usage() -> TenantUsage:
        return execute(store, limits.usage("ada", now=0.0))

    assert ask("a", 4) == ""
    assert usage() == TenantUsage(running=4, remaining_requests=4, remaining_tokens=60)
    assert ask("a", 4) == "", "the reply was lost"
    assert ask("a-2", 1) == "", "it has its slot"
    assert ask("b", 3) == "concurrency"
    for name in ("a", "a-1", "a-2", "a-3"):
        execute(store, limits.settle("ada", name, refund_tokens=4, now=0.0))
    assert usage() == TenantUsage(running=0, remaining_requests=4, remaining_tokens=76)
    assert ask("c", 5) == "requests_per_minute"
    assert ask("d", 4) == ""
    assert usage() == TenantUsage(running=4, remaining_requests=0, remaining_tokens=36)


async def test_answers_that_find_the_queue_full_are_all_given_back(
    gateway: Gateway, astore: redis.asyncio.Redis
) -> None:
    drafts = [draft(gateway, number, priority=0, tenant=TENANT) for number in range(QUEUE_LIMIT + 2)]
    with pytest.raises(QueueFull):
        await submit_choices(gateway, drafts, None)

    async def nothing_is_charged() -> bool:
        usage = await aexecute(astore, gateway.desk.limits.usage(TENANT.name))
        return usage == TenantUsage(running=0, remaining_requests=TENANT.rpm, remaining_tokens=TENANT.tpm)

    await until(nothing_is_charged)


async def test_more_answers_than_a_limit_ever_allows_are_no_matter_of_waiting(gateway: Gateway) -> None:
    drafts = [draft(gateway, number, tenant=TENANT) for number in range(7)]
    with pytest.raises(InvalidRequest, match=r"7 answers.* 6 concurrent") as refused:
        await submit_choices(gateway, drafts, None)
    assert refused.value.code == "request_exceeds_concurrency"
    with pytest.raises(InvalidRequest, match=r"7 answers.* 5 requests per minute"):
        await submit_choices(gateway, [replace(one, tenant=replace(TENANT, rpm=5)) for one in drafts], None)
    await gateway.submit(draft(gateway, 99, tenant=TENANT))
    with pytest.raises(RateLimited):
        await submit_choices(gateway, drafts[:6], None)
