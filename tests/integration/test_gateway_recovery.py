"""Clients that go away, and Redis, engines and web processes that stop in the middle of an answer."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest
import redis

from benchmarks.stack import Stack, ended, running_stack
from inference.messages import HistoryEvent, RequestEvent
from scheduling.limits import TenantLimits
from scheduling.store import execute
from tests.integration.gateway_support import KEYS, QUEUE, Api, code_of, frames_of, text_of
from tests.patience import PATIENCE_S, wait_until

LONG = 250
"""Tokens of an answer that is interrupted: it takes five seconds."""


@pytest.fixture
def stack() -> Iterator[Stack]:
    tenants: dict[str, dict[str, int]] = {"alpha": {"concurrency": 100}, "late": {"drop_expired": True}}
    with running_stack(tenants, PENSTOCK_QUEUE_LIMIT="20") as stack:
        yield stack


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def text(api: Api, stack: Stack) -> str:
    """What the engine says in `LONG` tokens to anybody."""
    with ended(stack.start_engine()):
        text = str(api.complete(max_tokens=LONG).json()["choices"][0]["text"])
        wait_until(lambda: api.snapshot().finished_total == 1)
    return text


def reply_stream(live: redis.Redis) -> str:
    """Key of the only web process's stream."""
    names: Any = live.zrange(KEYS.webs, 0, -1)
    (name,) = names
    return KEYS.replies(name.decode())


class Listener:
    """A client that reads a long stream in a thread of its own."""

    def __init__(self, api: Api, pool: ThreadPoolExecutor, max_tokens: int = LONG) -> None:
        self.text = ""
        self.begun = threading.Event()
        self.answer: Future[str] = pool.submit(self._listen, api, max_tokens)

    def _listen(self, api: Api, max_tokens: int) -> str:
        key = api.stack.api_keys["alpha"]
        body = {"model": "tiny", "prompt": "ba be bi", "max_tokens": max_tokens, "stream": True}
        headers = {"Authorization": f"Bearer {key}"}
        url = f"{api.stack.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=PATIENCE_S) as response:
            for part in response.iter_text():
                self.text += part
                self.begun.set()
        return self.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_leaves_the_queue_and_frees_its_slot(api: Api, live: redis.Redis, stream: bool) -> None:
    limits = TenantLimits(KEYS)
    with api.hanging(stream=stream):
        wait_until(lambda: api.snapshot().depth == 1)
        assert execute(live, limits.usage("alpha")).running == 1
    wait_until(lambda: api.snapshot().depth == 0)
    wait_until(lambda: execute(live, limits.usage("alpha")).running == 0)
    wait_until(lambda: live.xlen(KEYS.history) == 1)
    entries: Any = live.xrange(KEYS.history)
    ((_, fields),) = entries
    (event,) = msgspec.msgpack.decode(fields[b"m"], type=list[HistoryEvent])
    assert isinstance(event, RequestEvent)
    assert (event.state, event.completion_tokens) == ("cancelled", 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_running_request(api: Api, stack: Stack, stream: bool) -> None:
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.1)):
        with api.hanging(stream=stream, max_tokens=1500):  # for longer than anybody waits here
            wait_until(lambda: api.snapshot().running == 1)
        wait_until(lambda: api.snapshot().running == 0)
        assert api.snapshot().finished_total == 1


def test_what_waits_past_its_deadline_is_answered_with_504(api: Api, stack: Stack, pool: ThreadPoolExecutor) -> None:
    waiting = [pool.submit(api.complete, "late", deadline_ms=2000, stream=stream) for stream in (False, True)]
    patient = pool.submit(api.complete, "alpha", deadline_ms=2000)
    wait_until(lambda: api.snapshot().depth == 3)
    arrived_s = time.time()
    wait_until(lambda: time.time() > arrived_s + 2.0)
    with ended(stack.start_engine()):
        whole, stream = (future.result(PATIENCE_S) for future in waiting)
        assert patient.result(PATIENCE_S).status_code == 200, "its tenant did not ask to drop it"
    assert (whole.status_code, code_of(whole)) == (504, "deadline_exceeded")
    assert whole.json()["error"]["type"] == "timeout_error"
    assert stream.status_code == 200
    assert [frame["error"]["code"] for frame in frames_of(stream.text)] == ["deadline_exceeded"]


def test_a_full_queue_sheds_lower_priorities_first_and_gives_the_charge_back(
    api: Api, pool: ThreadPoolExecutor, live: redis.Redis
) -> None:
    waiting = [pool.submit(api.complete, priority="high", max_tokens=5) for _ in range(11)]
    wait_until(lambda: api.snapshot().depth == 11)
    refused = api.complete(priority="bulk")
    assert refused.status_code == 503
    assert code_of(refused) in ("queue_full", "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert execute(live, TenantLimits(KEYS).usage("alpha")).running == 11
    assert "reason=" in api.call("GET", "/metrics", None).text
    with ended(api.stack.start_engine()):
        assert {future.result(PATIENCE_S).status_code for future in waiting} == {200}


def test_a_stream_goes_on_after_redis_was_restarted(
    api: Api, stack: Stack, pool: ThreadPoolExecutor, text: str
) -> None:
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.02)):
        listener = Listener(api, pool)
        listener.begun.wait(PATIENCE_S)
        stack.redis.stop()
        refused = api.complete()
        assert (refused.status_code, code_of(refused)) == (503, "redis_unavailable")
        assert refused.headers["retry-after"]
        assert api.call("GET", "/healthz", None).status_code == 200
        not_ready = api.call("GET", "/readyz", None)
        assert not_ready.status_code == 503
        assert not not_ready.json()["checks"]["redis"]["ok"]
        assert "penstock_redis_up 0.0" in api.call("GET", "/metrics", None).text
        stack.redis.start()
        assert text_of(listener.answer.result(PATIENCE_S)) == text
        wait_until(lambda: api.complete(max_tokens=1).status_code == 200)


def test_tokens_lost_from_the_reply_stream_come_from_the_journal(
    api: Api, stack: Stack, pool: ThreadPoolExecutor, live: redis.Redis, text: str
) -> None:
    assert stack.web is not None
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.02)):
        listener = Listener(api, pool)
        listener.begun.wait(PATIENCE_S)
        stack.web.send_signal(signal.SIGSTOP)
        stream = reply_stream(live)
        for _ in range(2):
            length = live.xlen(stream)
            wait_until(lambda length=length: live.xlen(stream) > length + 5)  # type: ignore[misc]
            live.xtrim(stream, maxlen=1, approximate=False)
        stack.web.send_signal(signal.SIGCONT)
        assert text_of(listener.answer.result(PATIENCE_S)) == text


def test_an_end_lost_from_the_reply_stream_comes_from_the_record(
    api: Api, stack: Stack, pool: ThreadPoolExecutor, live: redis.Redis, text: str
) -> None:
    assert stack.web is not None
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.02)):
        listener = Listener(api, pool)
        listener.begun.wait(PATIENCE_S)
        stack.web.send_signal(signal.SIGSTOP)
        wait_until(lambda: api.snapshot().finished_total == 2)
        live.delete(reply_stream(live))
        stack.web.send_signal(signal.SIGCONT)
        answer = listener.answer.result(PATIENCE_S)
        assert text_of(answer) == text
        assert answer.endswith("data: [DONE]\n\n")


def test_another_engine_goes_on_where_a_killed_one_stopped(
    api: Api, stack: Stack, pool: ThreadPoolExecutor, live: redis.Redis, text: str
) -> None:
    first = stack.start_engine(tokens_per_step=1, step_s=0.02)
    with ended(first):
        listeners = [Listener(api, pool) for _ in range(10)]
        for listener in listeners:
            listener.begun.wait(PATIENCE_S)
        first.kill()
        first.wait()
    assert sum(num for _, num in execute(live, QUEUE.expire(now=time.time() + 3600))) == 10
    with ended(stack.start_engine(tokens_per_step=5)):
        assert {text_of(listener.answer.result(PATIENCE_S)) for listener in listeners} == {text}


def test_a_request_whose_data_redis_lost_ends_with_an_error(
    api: Api, stack: Stack, pool: ThreadPoolExecutor, live: redis.Redis
) -> None:
    listener = Listener(api, pool)
    wait_until(lambda: api.snapshot().depth == 1)
    live.flushall()
    last = frames_of(listener.answer.result(PATIENCE_S))[-1]
    assert last["error"]["code"] == "request_lost"


def test_a_web_process_that_stops_tells_its_clients_and_cleans_up(
    api: Api, stack: Stack, pool: ThreadPoolExecutor, live: redis.Redis
) -> None:
    assert stack.web is not None
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.05)):
        long, short = Listener(api, pool, 1500), Listener(api, pool, 30)
        long.begun.wait(PATIENCE_S)
        short.begun.wait(PATIENCE_S)
        stream = reply_stream(live)
        stack.web.terminate()
        last = frames_of(long.answer.result(PATIENCE_S))[-1]
        assert last["error"]["code"] == "server_shutting_down"
        assert short.answer.result(PATIENCE_S).endswith("data: [DONE]\n\n")
        assert stack.web.wait(PATIENCE_S) is not None
        assert live.zcard(KEYS.webs) == 0
        wait_until(lambda: api.snapshot().running == 0)
        assert live.ttl(stream) != -1, "a stream that nobody reads must end"
