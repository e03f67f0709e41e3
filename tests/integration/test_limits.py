"""Tenants' limits in a real Redis: exact over many processes, atomic, charged once, given back once."""

import multiprocessing
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduling.core.admission import Bucket
from scheduling.keys import Keys
from scheduling.limits import Admission, TenantLimits
from scheduling.store import execute
from tests.patience import PATIENCE_S

UNLIMITED: dict[str, int | None] = {"rpm": None, "tpm": None, "concurrency": None}


def acquire(store: redis.Redis, keys: Keys, request_id: str, now: float = 0.0, **limits: Any) -> Admission:
    asked = {**UNLIMITED, "tokens": 1, **limits}
    return execute(store, TenantLimits(keys).acquire("ada", request_id, **asked, now=now))


def hammer(url: str, prefix: str, name: str, barrier: Barrier, admitted: Any) -> None:
    limits = TenantLimits(Keys(prefix))
    with redis.Redis.from_url(url) as client:
        barrier.wait()
        for i in range(300):
            command = limits.acquire(
                "ada", f"{name}-{i}", rpm=500, tpm=10_000, concurrency=400, tokens=[1, 7, 100][i % 3], now=1000.0
            )
            if execute(client, command).ok:
                admitted.put([1, 7, 100][i % 3])


@pytest.mark.parametrize("num_processes", [4])
def test_many_processes_together_get_exactly_what_the_limits_allow(
    redis_url: str, store: redis.Redis, keys: Keys, num_processes: int
) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, admitted = context.Barrier(num_processes), context.Queue()
    processes = [
        context.Process(target=hammer, args=(redis_url, keys.prefix, f"p{i}", barrier, admitted))
        for i in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * num_processes
    usage = execute(store, TenantLimits(keys).usage("ada", now=1000.0))
    tokens = [admitted.get(timeout=PATIENCE_S) for _ in range(usage.running)]
    assert admitted.empty()
    assert usage.remaining_requests == 500 - len(tokens)
    assert usage.remaining_tokens == 10_000 - sum(tokens)
    # 1,200 asked: the first limit to bind is 400 at once, or the tokens; never more than any of them.
    assert len(tokens) == 400 or (usage.remaining_tokens or 0) < 100


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"rpm": 2}, "requests_per_minute"),
        ({"tpm": 25, "tokens": 10}, "tokens_per_minute"),
        ({"tpd": 25, "tokens": 10}, "tokens_per_day"),
        ({"concurrency": 2}, "concurrency"),
    ],
)
def test_the_third_request_is_refused_with_the_limit_that_was_reached(
    store: redis.Redis, keys: Keys, limits: dict[str, Any], reason: str
) -> None:
    assert acquire(store, keys, "r1", **limits).ok
    assert acquire(store, keys, "r2", **limits).ok
    refused = acquire(store, keys, "r3", **limits)
    assert (refused.ok, refused.reason) == (False, reason)
    assert refused.retry_after_s > 0
    assert execute(store, TenantLimits(keys).usage("ada", now=0.0)).running == 2, "who is refused holds no slot"


def test_a_refusal_charges_nothing(store: redis.Redis, keys: Keys) -> None:
    assert not acquire(store, keys, "r1", rpm=10, tpm=100, concurrency=5, tokens=101).ok
    after = acquire(store, keys, "r2", rpm=10, tpm=100, concurrency=5, tokens=100)
    assert (after.ok, after.remaining_requests, after.remaining_tokens) == (True, 9, 0)
    assert execute(store, TenantLimits(keys).usage("ada", now=0.0)).running == 1


def test_the_same_request_is_charged_once_while_it_lives(store: redis.Redis, keys: Keys) -> None:
    first = acquire(store, keys, "r1", rpm=10, tpm=100, concurrency=1, tokens=60)
    again = acquire(store, keys, "r1", rpm=10, tpm=100, concurrency=1, tokens=60)
    assert first == again
    assert again.ok


def test_what_was_not_used_comes_back_once_and_never_beyond_a_full_bucket(store: redis.Redis, keys: Keys) -> None:
    limits = TenantLimits(keys)
    acquire(store, keys, "r1", tpm=100, tokens=60)
    for _ in range(2):
        execute(store, limits.settle("ada", "r1", refund_tokens=25, now=0.0))
    usage = execute(store, limits.usage("ada", now=0.0))
    assert (usage.running, usage.remaining_tokens) == (0, 65)
    acquire(store, keys, "r2", tpm=100, tokens=1)
    execute(store, limits.settle("ada", "r2", refund_tokens=10_000, now=0.0))
    assert execute(store, limits.usage("ada", now=0.0)).remaining_tokens == 100


DAY_S = 86_400.0


def test_a_daily_budget_ends_at_midnight_utc(store: redis.Redis, keys: Keys) -> None:
    evening = 20_000 * DAY_S - 60
    assert acquire(store, keys, "r1", now=evening, tpd=100, tokens=80).ok
    refused = acquire(store, keys, "r2", now=evening, tpd=100, tokens=30)
    assert (refused.ok, refused.reason, refused.retry_after_s) == (False, "tokens_per_day", 60.0)
    assert acquire(store, keys, "r3", now=evening, tpd=100, tokens=20).ok
    assert acquire(store, keys, "r4", now=evening + 60, tpd=100, tokens=100).ok
    assert not acquire(store, keys, "r5", now=evening + 60, tpd=100, tokens=1).ok


def test_what_was_not_used_goes_back_to_the_budget_of_the_day_it_was_charged_on(store: redis.Redis, keys: Keys) -> None:
    limits, evening = TenantLimits(keys), 20_000 * DAY_S - 60
    acquire(store, keys, "r1", now=evening, tpd=100, tokens=40)
    acquire(store, keys, "r2", now=evening, tpd=100, tokens=60)
    for _ in range(2):
        execute(store, limits.settle("ada", "r1", refund_tokens=30, now=evening))
    assert not acquire(store, keys, "r3", now=evening, tpd=100, tokens=31).ok
    assert acquire(store, keys, "r3", now=evening, tpd=100, tokens=30).ok
    assert acquire(store, keys, "r4", now=evening + 60, tpd=100, tokens=100).ok
    execute(store, limits.settle("ada", "r2", refund_tokens=60, now=evening + 61))
    assert not acquire(store, keys, "r5", now=evening + 61, tpd=100, tokens=1).ok, "yesterday's are not today's"


def test_a_refusal_by_the_day_charges_no_bucket(store: redis.Redis, keys: Keys) -> None:
    assert not acquire(store, keys, "r1", rpm=10, tpm=100, concurrency=5, tpd=50, tokens=51).ok
    after = acquire(store, keys, "r2", rpm=10, tpm=100, concurrency=5, tpd=50, tokens=50)
    assert (after.ok, after.remaining_requests, after.remaining_tokens) == (True, 9, 50)


def test_a_charge_that_is_cancelled_leaves_no_trace(store: redis.Redis, keys: Keys) -> None:
    limits = TenantLimits(keys)
    acquire(store, keys, "r1", rpm=10, tpm=100, tokens=60)
    for _ in range(2):
        execute(store, limits.cancel_charge("ada", "r1", tokens=60, now=0.0))
    usage = execute(store, limits.usage("ada", now=0.0))
    assert (usage.running, usage.remaining_requests, usage.remaining_tokens) == (0, 10, 100)


def test_a_changed_limit_holds_from_the_next_request_on(store: redis.Redis, keys: Keys) -> None:
    assert acquire(store, keys, "r1", rpm=100).ok
    lowered = acquire(store, keys, "r2", rpm=1)
    assert (lowered.ok, lowered.remaining_requests, lowered.limit_requests) == (True, 0, 1)
    assert not acquire(store, keys, "r3", rpm=1).ok


def test_the_buckets_of_an_idle_tenant_go_away_by_themselves_after_the_longest_answer(
    store: redis.Redis, keys: Keys
) -> None:
    acquire(store, keys, "r1", rpm=10, tpm=100)
    execute(store, TenantLimits(keys).settle("ada", "r1", refund_tokens=0))
    left = list(store.scan_iter(f"{keys.tenant('ada')}:*"))
    assert left
    assert all(24 <= int(store.ttl(key)) / 3600 <= 48 for key in left), "an upstream's answer may run for hours"


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 60), st.integers(10, 200)), max_size=20))
def test_the_script_does_the_arithmetic_of_the_bucket_in_python(
    store: redis.Redis, keys: Keys, steps: list[tuple[float, int, int]]
) -> None:
    for key in store.scan_iter(f"{keys.tenant('ada')}:*"):
        store.delete(key)
    now = 1000.0
    stored: Bucket | None = None
    for i, (gap_s, tokens, tpm) in enumerate(steps):
        now += gap_s
        bucket = stored.at(now, tpm) if stored else Bucket.full(tpm, now)
        answer = acquire(store, keys, f"r{i}", now=now, tpm=tpm, tokens=tokens)
        assert answer.ok == (bucket.level >= tokens)
        if answer.ok:
            bucket = stored = bucket.take(tokens)
        else:
            # A refusal stores nothing: the next step fills up from the last charge.
            assert answer.retry_after_s == pytest.approx(bucket.wait_s(tokens))
        assert answer.remaining_tokens == int(bucket.level)
        assert answer.reset_tokens_s == pytest.approx(bucket.wait_s(tpm))


def test_what_was_used_beyond_the_charge_is_owed_and_fills_up_again(store: redis.Redis, keys: Keys) -> None:
    limits = TenantLimits(keys)
    assert acquire(store, keys, "r1", tokens=50, tpm=60, tpd=1000).ok
    execute(store, limits.settle("ada", "r1", refund_tokens=-40, now=0.0))
    owing = acquire(store, keys, "r2", tokens=10, tpm=60, tpd=1000)
    assert (owing.ok, owing.retry_after_s, owing.remaining_tokens) == (False, 40.0, 0)
    assert acquire(store, keys, "r3", tokens=10, tpm=60, tpd=1000, now=40.0).ok
    assert store.hget(f"{keys.tenant('ada')}:day", "tokens") == b"100"
    execute(store, limits.settle("ada", "r3", refund_tokens=-10_000, now=40.0))
    assert acquire(store, keys, "r4", tokens=60, tpm=60, now=159.0).retry_after_s == pytest.approx(1.0)
