"""`Idempotency-Key`: one request and one answer, however often, wherever and whenever it is sent."""

import asyncio
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from benchmarks.stack import MODEL, Stack, ended, running_stack
from inference.sweeper import SECOND_LOOK_S, Sweeper
from scheduling.limits import TenantLimits
from scheduling.store import TIME, execute
from tests.integration.gateway_support import KEYS, Api, code_of, frames_of, text_of
from tests.patience import PATIENCE_S, wait_until

NUM_DUPLICATES = 200
LONG = 150


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    tenants = {"alpha": {}, "beta": {}, "counted": {"rpm": 6, "concurrency": 1}, "few": {"rpm": 1}}
    tenants |= {"first": {"max_priority": 0}}
    with running_stack(tenants) as stack:
        yield stack
        assert stack.web is not None
        with ended(stack.web):  # perhaps a later one than the first
            pass


@pytest.fixture(scope="module")
def other_url(stack: Stack) -> Iterator[str]:
    with stack.more_webs(1) as (url,):
        yield url


def keyed(api: Api, key: str, tenant: str = "alpha", **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "ba be bi", **fields}
    return api.call("POST", "/v1/completions", tenant, json=body, headers={"Idempotency-Key": key})


def text_and_id(response: httpx.Response) -> tuple[str, str]:
    """Of a whole answer or a stream."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        body = response.json()
        return body["choices"][0]["text"], body["id"]
    assert response.text.endswith("data: [DONE]\n\n")
    return text_of(response.text), frames_of(response.text)[0]["id"]


def new_key() -> str:
    return uuid.uuid4().hex


async def test_many_duplicates_at_once_over_two_processes_are_one_request(
    api: Api, stack: Stack, other_url: str, live: redis.Redis
) -> None:
    before = api.snapshot().enqueued_total
    headers = {"Authorization": f"Bearer {stack.api_keys['counted']}", "Idempotency-Key": new_key()}
    body = {"model": MODEL, "prompt": "ba", "max_tokens": 50}

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[str, str]:
        url = (stack.url, other_url)[number % 2] + "/v1/completions"
        asked = body | ({"stream": True} if number % 3 else {})
        return text_and_id(await client.post(url, json=asked, headers=headers))

    limits = httpx.Limits(max_connections=NUM_DUPLICATES)
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.01)):
        async with httpx.AsyncClient(limits=limits, timeout=PATIENCE_S) as client:
            answers = await asyncio.gather(*(ask(client, number) for number in range(NUM_DUPLICATES)))
    assert len(set(answers)) == 1
    assert len(answers[0][0].split()) == 50
    assert api.snapshot().enqueued_total == before + 1
    limits_of = TenantLimits(KEYS)
    wait_until(lambda: execute(live, limits_of.usage("counted")).running == 0)  # the engine settles after its answer
    assert (execute(live, limits_of.usage("counted")).remaining_requests or 0) >= 5  # more come with time


def test_another_body_or_address_is_a_conflict_and_another_tenant_is_not(api: Api, stack: Stack) -> None:
    key = new_key()
    with ended(stack.start_engine()):
        first = text_and_id(keyed(api, key, max_tokens=5))
        num_enqueued = api.snapshot().enqueued_total
        others = ({"max_tokens": 6}, {"max_tokens": 5, "prompt": "bu"}, {"max_tokens": 5, "n": 2})
        for other in (keyed(api, key, **fields) for fields in others):
            assert (other.status_code, code_of(other)) == (409, "idempotency_key_reused")
            assert other.json()["error"]["param"] == "Idempotency-Key"
        assert api.snapshot().enqueued_total == num_enqueued
        native = api.call(
            "POST",
            "/api/v1/requests",
            json={"model": MODEL, "prompt": "ba be bi", "max_tokens": 5},
            headers={"Idempotency-Key": key},
        )
        assert (native.status_code, code_of(native)) == (409, "idempotency_key_reused")
        assert text_and_id(keyed(api, key, "beta", max_tokens=5))[1] != first[1]
        # The same, however it is written: options spelled as null, streamed.
        assert text_and_id(keyed(api, key, max_tokens=5, user=None, stop=None, stream=True)) == first


def test_an_answer_is_whole_for_a_repeat_to_another_process_and_after_a_restart(
    api: Api, stack: Stack, other_url: str
) -> None:
    key, fields = new_key(), dict[str, Any](max_tokens=LONG)
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.01)):
        with api.hanging(headers={"Idempotency-Key": key}, stream=True, **fields):
            wait_until(lambda: api.snapshot().running == 1)
            assert stack.web is not None
            stack.web.send_signal(signal.SIGKILL)
            stack.web.wait()
        elsewhere = httpx.post(
            f"{other_url}/v1/completions",
            json={"model": MODEL, "prompt": "ba be bi", "stream": True, **fields},
            headers={"Authorization": f"Bearer {stack.api_keys['alpha']}", "Idempotency-Key": key},
            timeout=PATIENCE_S,
        )
        stack.start_web()
    answers = {text_and_id(elsewhere), *(text_and_id(keyed(api, key, stream=s, **fields)) for s in (True, False))}
    assert len(answers) == 1
    assert len(answers.pop()[0].split()) == LONG


def test_an_answer_whose_stream_is_gone_comes_from_its_record(api: Api, stack: Stack, live: redis.Redis) -> None:
    key = new_key()
    with ended(stack.start_engine()):
        first = text_and_id(keyed(api, key, max_tokens=9))
        assert live.delete(KEYS.replies(first[1])) == 1
        assert text_and_id(keyed(api, key, max_tokens=9)) == first


def test_a_refused_request_leaves_no_key(api: Api, stack: Stack, live: redis.Redis) -> None:
    with ended(stack.start_engine()):
        assert keyed(api, new_key(), "few").status_code == 200
    assert len(list(live.scan_iter(f"{KEYS.tenant('few')}:key:*"))) == 1
    key = new_key()
    assert code_of(keyed(api, key, "few")) == "requests_per_minute_exceeded"
    assert code_of(keyed(api, key, "few", temperature=9)) == "invalid_value"
    assert len(list(live.scan_iter(f"{KEYS.tenant('few')}:key:*"))) == 1


def test_a_cancelled_request_runs_anew(api: Api, stack: Stack) -> None:
    key = new_key()

    def submit() -> httpx.Response:
        body = {"model": MODEL, "prompt": "ba", "max_tokens": 5}
        return api.call("POST", "/api/v1/requests", json=body, headers={"Idempotency-Key": key})

    first, repeat = submit().json(), submit().json()
    assert first["id"] == repeat["id"]
    assert api.call("DELETE", f"/api/v1/requests/{first['id']}").json()["was"] == "queued"
    third = submit().json()
    assert third["id"] != first["id"]
    assert api.call("DELETE", f"/api/v1/requests/{third['id']}").json()["was"] == "queued"


def test_who_leaves_takes_nothing_from_who_stays_and_the_last_one_s_request_is_cancelled_a_while_later(
    api: Api, live: redis.Redis
) -> None:
    options: dict[str, Any] = {"tenant": "first", "headers": {"Idempotency-Key": new_key()}, "priority": "critical"}
    before = awaited(live)
    with api.hanging(**options), api.hanging(**options, stream=True):
        wait_until(lambda: api.snapshot().depth == 1)
        with api.hanging(**options):
            wait_until(lambda: awaited(live) - before)
        sweep(live, later_s=0.0)
        assert api.snapshot().depth == 1
    sweep(live, later_s=20.0)
    assert api.snapshot().depth == 1, "a retry may still come"
    sweep(live, later_s=40.0)
    assert api.snapshot().depth == 0
    assert execute(live, TenantLimits(KEYS).usage("first")).running == 0
    assert not awaited(live) - before


def awaited(live: redis.Redis) -> set[bytes]:
    """Requests that some client waits for."""
    names: Any = live.zrange(KEYS.awaits, 0, -1)
    return set(names)


def sweep(live: redis.Redis, later_s: float) -> None:
    """What the sweeper does within a few seconds, so much later."""
    live.sadd(KEYS.models, MODEL)
    offset_s = later_s
    sweeper = Sweeper(live, KEYS, clock=lambda: execute(live, TIME) + offset_s)
    sweeper.run_once()
    offset_s += SECOND_LOOK_S
    sweeper.run_once()


@pytest.mark.parametrize("key", ["", "a" * 256, "a b", "caf\xe9"])
def test_a_key_out_of_bounds_is_refused(api: Api, key: str) -> None:
    headers = [(b"Idempotency-Key", key.encode("latin-1"))]
    response = httpx.post(
        f"{api.stack.url}/v1/completions",
        json={"model": MODEL, "prompt": "ba"},
        headers=[*headers, (b"Authorization", f"Bearer {api.stack.api_keys['alpha']}".encode())],
    )
    assert (response.status_code, code_of(response)) == (400, "invalid_idempotency_key")


def test_a_repeat_in_the_middle_of_an_answer_begins_at_its_first_token(api: Api, stack: Stack) -> None:
    key = new_key()
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.01)), ThreadPoolExecutor(2) as pool:
        asked = dict[str, Any](max_tokens=LONG, stream=True, priority="critical")
        first = pool.submit(keyed, api, key, "first", **asked)
        wait_until(lambda: num_journalled(api) > 20)
        late = pool.submit(keyed, api, key, "first", **asked)
        assert text_and_id(first.result(PATIENCE_S)) == text_and_id(late.result(PATIENCE_S))


def num_journalled(api: Api) -> int:
    """Tokens of the only request that runs."""
    with redis.Redis.from_url(api.stack.redis.url) as client:
        running = [key for key in client.scan_iter(f"{KEYS.queue(MODEL)}:tok:*") if client.ttl(key) == -1]
        return sum(int(client.strlen(key)) // 4 for key in running)
