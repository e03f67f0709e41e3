"""Limits of a tenant through four real web processes, and that a refused request never costs anything."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from benchmarks.stack import MODEL, Stack, running_stack
from inference.directory import TenantConfig
from inference.gateway.errors import GatewayError
from inference.gateway.gateway import Gateway
from scheduling.core.backpressure import BackpressureLimits
from scheduling.keys import Keys
from scheduling.store import aexecute
from tests.integration.gateway_support import draft, open_gateway
from tests.patience import PATIENCE_S, until

NUM_WEBS = 4
ASKED = 200
TOKENS = 100
"""Charged for each request: the prompt's tokens and `max_tokens`."""
LIMITS: dict[str, tuple[dict[str, int], int]] = {
    "requests": ({"rpm": 12}, 12),
    "tokens": ({"tpm": 13 * TOKENS + TOKENS // 2}, 13),
    "daily": ({"tpd": 37 * TOKENS + TOKENS - 1}, 37),
    "concurrent": ({"concurrency": 41}, 41),
    "all": ({"rpm": 100, "tpm": 100 * TOKENS, "tpd": 9 * TOKENS, "concurrency": 10}, 9),
}
"""Per tenant its limits, and how many requests fit into them."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack({name: quota for name, (quota, _) in LIMITS.items()}) as stack:
        yield stack


@pytest.fixture(scope="module")
def urls(stack: Stack) -> Iterator[list[str]]:
    with stack.more_webs(NUM_WEBS - 1) as others:
        yield [stack.url, *others]


@pytest.mark.parametrize("tenant", LIMITS)
async def test_four_web_processes_together_admit_exactly_what_a_tenant_s_limits_allow(
    stack: Stack, urls: list[str], tenant: str
) -> None:
    quota, allowed = LIMITS[tenant]
    body = {"model": MODEL, "prompt": [10] * 10, "max_tokens": TOKENS - 10, "stream": True}
    headers = {"Authorization": f"Bearer {stack.api_keys[tenant]}"}
    limits = httpx.Limits(max_connections=ASKED)
    began = time.monotonic()
    async with httpx.AsyncClient(limits=limits, timeout=PATIENCE_S) as client:
        # An admitted stream has its status before its first token, and holds its slot until it is closed.
        asked = (
            client.build_request("POST", f"{urls[i % NUM_WEBS]}/v1/completions", json=body, headers=headers)
            for i in range(ASKED)
        )
        answers = await asyncio.gather(*(client.send(request, stream=True) for request in asked))
        elapsed_s = time.monotonic() - began
        refused = [answer for answer in answers if answer.status_code == 429]
        codes = {(await answer.aread(), answer.json()["error"]["code"])[1] for answer in refused}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        for answer in answers:
            await answer.aclose()
    admitted = sum(answer.status_code == 200 for answer in answers)
    assert admitted + len(refused) == ASKED
    # What flows into the buckets meanwhile may be taken, too; it is less than a request unless the machine stalls.
    buckets = [quota[name] / cost for name, cost in (("rpm", 1), ("tpm", TOKENS)) if name in quota]
    fixed = [quota[name] // cost for name, cost in (("concurrency", 1), ("tpd", TOKENS)) if name in quota]
    assert allowed <= admitted <= min([int(size * (1 + elapsed_s / 60)) for size in buckets] + fixed)
    assert codes <= {f"{reason}_exceeded" for reason in REASONS[tenant]}


REASONS = {
    "requests": ["requests_per_minute"],
    "tokens": ["tokens_per_minute"],
    "daily": ["tokens_per_day"],
    "concurrent": ["concurrency"],
    "all": ["tokens_per_day", "concurrency"],
}


@pytest.fixture
async def gateway(redis_url: str, keys: Keys, tmp_path: Path) -> AsyncIterator[Gateway]:
    never, full = (1e9, 1e9, 1e9, 1e9), (2.0, 2.0, 2.0, 2.0)
    limits = BackpressureLimits(depth=full, wait_s=never)
    async with open_gateway(redis_url, keys, tmp_path, queue_limit=8, queue_tokens=200, backpressure=limits) as gateway:
        yield gateway


LIMIT = st.none() | st.integers(4, 16)
TENANTS = st.builds(
    lambda rpm, tokens, days, slots: {
        "rpm": rpm,
        "tpm": tokens and tokens * 25,
        "tpd": days and days * 40,
        "concurrency": slots,
    },
    *(LIMIT for _ in range(4)),
)
REQUESTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.integers(0, 9)), min_size=8, max_size=25)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),
    report_multiple_bugs=False,
)
@given(quota=TENANTS, requests=REQUESTS)
async def test_whatever_refuses_a_request_only_admitted_ones_are_charged(
    gateway: Gateway, astore: redis.asyncio.Redis, keys: Keys, quota: dict[str, Any], requests: list[Any]
) -> None:
    """Refused by length, by deadline, by each of the limits, by the queue's bounds, or shed later for another."""
    await forget(astore, keys)
    tenant = TenantConfig(name="ada", max_priority=0, drop_expired=True, **quota)
    began, replies = time.monotonic(), []
    for number, (priority, tokens, kind) in enumerate(requests):
        fields: dict[str, Any] = {"tenant": tenant, "prompt_token_ids": [10], "max_tokens": tokens}
        if kind == 0:
            fields["max_tokens"] = 10**6
        if kind == 1:
            fields["deadline_s"] = time.time() - 1
        try:
            replies.append(await gateway.submit(draft(gateway, number, priority, **fields)))
        except GatewayError as error:
            event(f"{type(error).__name__} {error.code}")
    queue, limits = gateway.find_model("tiny").queue, gateway.desk.limits

    async def is_settled() -> bool:
        return (await aexecute(astore, limits.usage("ada"))).running == (await aexecute(astore, queue.snapshot())).depth

    await until(is_settled)  # what was shed is settled by a task of its own
    usage, snapshot = await aexecute(astore, limits.usage("ada")), await aexecute(astore, queue.snapshot())
    day = await astore.hget(f"{keys.tenant('ada')}:day", "tokens")
    if tenant.tpd is not None and (replies or day is not None):
        assert int(day or 0) == snapshot.waiting_tokens
    elapsed_s = time.monotonic() - began
    if usage.remaining_tokens is not None and tenant.tpm is not None:
        left = tenant.tpm - snapshot.waiting_tokens
        assert left <= usage.remaining_tokens <= left + elapsed_s * tenant.tpm / 60
    if usage.remaining_requests is not None and tenant.rpm is not None:
        assert tenant.rpm - len(replies) <= usage.remaining_requests
        assert usage.remaining_requests <= tenant.rpm - snapshot.depth + elapsed_s * tenant.rpm / 60
    for reply in replies:
        reply.abandon()


async def forget(astore: redis.asyncio.Redis, keys: Keys) -> None:
    """Everything that an earlier example left of its tenant and in the queue."""
    for base in (keys.tenant("ada"), keys.queue("tiny")):
        # Of all keys of this test run; ten a call, which is usual, would be thousands of calls.
        async for key in astore.scan_iter(f"{base}:*", count=10_000):
            await astore.delete(key)
