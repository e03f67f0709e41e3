"""The process of an upstream replica, before a server that does whatever servers do."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from inference.messages import ReplicaStatus, RequestEvent
from inference.worker.process import EngineProcess
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import execute
from tests.integration.engines import Engines
from tests.integration.fleet import FleetClient
from tests.integration.upstreams import Act, Call, Upstream, forwarded, frame, piece, three_words

COMMAND = [sys.executable, "-m", "inference.upstream"]
MODEL = Engines.model
Start = Callable[..., EngineProcess]


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys) -> FleetClient:
    return FleetClient(store, keys, MODEL)


@pytest.fixture
def start(redis_url: str, keys: Keys, upstream: Upstream, fleet: FleetClient) -> Iterator[Start]:
    """Starts a replica before the upstream, and waits until it serves."""
    with Engines(Path(), redis_url, keys) as engines:

        def launch(replica: str = "gpu-0", state: str = "ready", **fields: Any) -> EngineProcess:
            fields = {"backend": "openai", "upstream_url": upstream.url, **fields}
            process = engines.start(replica, command=COMMAND, **fields)
            fleet.until_state(replica, state)
            return process

        yield launch


def submit(fleet: FleetClient, *request_ids: str, max_tokens: int = 20, **fields: Any) -> None:
    for request_id in request_ids:
        body = forwarded(request_id, model=MODEL, max_tokens=max_tokens, **fields)
        fleet.submit(request_id, [0] * 4, max_tokens, body=body)


def event_of(fleet: FleetClient, request_id: str) -> RequestEvent:
    fleet.until(lambda: any(event.id == request_id for event in fleet.events(RequestEvent)))
    return next(event for event in fleet.events(RequestEvent) if event.id == request_id)


def unhealthy(fleet: FleetClient) -> ReplicaStatus:
    return fleet.until_state("gpu-0", "unhealthy")


def test_messages_and_options_reach_the_upstream_as_they_are_and_its_count_of_tokens_settles(
    start: Start,
    fleet: FleetClient,
    upstream: Upstream,
    store: redis.Redis,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-secret")
    start(upstream_key="SOME_API_KEY", upstream_model="org/model:7b")
    limits = TenantLimits(keys)
    admission = execute(store, limits.acquire("acme", "r1", rpm=None, tpm=600_000, concurrency=1, tokens=24, tpd=10**6))
    assert admission.ok
    messages = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}]
    submit(fleet, "r1", messages=messages, temperature=0.5, stop=["x"])
    fleet.until_finished()
    call = upstream.calls[0]
    assert call.path == "/v1/chat/completions"
    assert call.headers["authorization"] == "Bearer sk-secret"
    assert call.body == {
        "messages": messages, "temperature": 0.5, "stop": ["x"], "model": "org/model:7b", "max_tokens": 20, "seed": 5,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    answer = fleet.answers["r1"]
    assert (answer.text, answer.finish and answer.finish.reason) == ("one two three", "stop")
    event = event_of(fleet, "r1")
    assert (event.prompt_tokens, event.completion_tokens, event.state) == (7, 3, "finished")
    fleet.until(lambda: execute(store, limits.usage("acme")).running == 0)
    assert store.hget(f"{keys.tenant('acme')}:day", "tokens") == b"10"
    status = fleet.until_state("gpu-0", "ready")
    assert (status.backend, status.telemetry) == ("openai", None)
    assert "is not watched" in status.detail
    submit(fleet, "r2", endpoint="completions", prompt="ba be")
    fleet.until_finished()
    assert (upstream.calls[1].path, upstream.calls[1].body["prompt"]) == ("/v1/completions", "ba be")


def test_a_cancelled_request_closes_the_connection_to_the_upstream(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    async def go_on_for_ever(call: Call) -> None:
        await call.start()
        await call.send(piece("a"))
        await call.until_gone()

    upstream.act = go_on_for_ever
    start()
    submit(fleet, "r1")
    fleet.until(lambda: fleet.answers["r1"].token_ids)
    execute(fleet.client, fleet.queue.cancel("r1"))
    fleet.until_finished()
    assert fleet.answers["r1"].finish is not None
    assert fleet.answers["r1"].finish.reason == "cancelled"
    fleet.until(upstream.calls[0].gone.is_set)
    assert event_of(fleet, "r1").completion_tokens == 1


REFUSALS = {
    "r1": (400, b'{"error": {"message": "max_tokens\\nis \\u001b big", "code": 4}}', "upstream_refused", "max_tokens"),
    "r2": (400, b'{"error": {"message": "lo", "code": "context_length_exceeded"}}', "context_length_exceeded", "lo"),
    "r3": (422, b"<html>secret stack</html>", "upstream_refused", "refused the request (422)"),
    "r4": (404, b'{"error": "no such model"}', "upstream_no_model", "no such model"),
}


def test_a_request_that_the_upstream_refuses_fails_alone_with_its_message(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    async def refuse_some(call: Call) -> None:
        refusal = REFUSALS.get(call.body["messages"][0]["content"])
        await (call.refuse(*refusal[:2]) if refusal else call.say("fine"))

    upstream.act = refuse_some
    start()
    for request_id in ("r0", *REFUSALS, "r5"):
        submit(fleet, request_id, messages=[{"role": "user", "content": request_id}])
    fleet.until_finished()
    assert fleet.answers["r0"].text == fleet.answers["r5"].text == "fine"
    for request_id, (_, _, code, message) in REFUSALS.items():
        finish = fleet.answers[request_id].finish
        assert finish is not None
        assert (finish.reason, finish.error_code) == ("error", code)
        assert message in finish.error_message
        assert "stack" not in finish.error_message
        assert finish.error_message.isprintable()
    assert fleet.until_state("gpu-0", "ready").detail.startswith("Forwards to")


def test_a_model_that_the_upstream_has_lost_costs_few_of_the_requests_that_wait(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    async def know_no_model(call: Call) -> None:
        await call.refuse(404, b'{"error": "no such model"}')

    upstream.act = know_no_model
    start(max_batch_size=2, sizing="fixed")
    submit(fleet, *(f"r{number}" for number in range(12)))
    fleet.until(lambda: "has no model" in unhealthy(fleet).detail)
    upstream.act, upstream.probe = three_words, (200, b'{"data": [{"id": "%s"}]}' % MODEL.encode())
    fleet.until_finished()
    codes = [answer.finish.error_code for answer in fleet.answers.values() if answer.finish]
    assert 0 < codes.count("upstream_no_model") < 6
    assert codes.count("") == 12 - codes.count("upstream_no_model")


async def _fail(call: Call) -> None:
    await call.refuse(500, b'{"error": {"message": "Traceback"}}')


async def _be_busy(call: Call) -> None:
    await call.refuse(429, b"{}", retry_after="1")


async def _drop(call: Call) -> None:
    call.drop()


async def _redirect(call: Call) -> None:
    await call.refuse(307, b"", location="http://127.0.0.1:1/elsewhere")


async def _shut_out(call: Call) -> None:
    await call.refuse(401, b'{"error": {"message": "bad key sk-secret"}}')


def test_a_request_waits_in_the_queue_while_the_upstream_is_unhealthy_and_is_answered_when_it_serves_again(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    start()
    for trouble in (_fail, _be_busy, _drop, _redirect, _shut_out):
        num_before = len(upstream.calls)

        async def recover(call: Call, trouble: Act = trouble, num_before: int = num_before) -> None:
            if len(upstream.calls) == num_before + 1:
                upstream.probe = (503, b"")
                await trouble(call)
            else:
                await call.say("fine")

        upstream.act = recover
        name = trouble.__name__
        submit(fleet, name)
        assert "upstream" in unhealthy(fleet).detail.lower()
        fleet.until(lambda: execute(fleet.client, fleet.queue.snapshot()).depth == 1)
        upstream.probe = (200, b"{}")
        fleet.until_finished()
        assert fleet.answers[name].text == "fine"
        assert len(upstream.calls) == num_before + 2
        fleet.until_state("gpu-0", "ready")


def test_an_upstream_that_is_away_is_waited_for(start: Start, fleet: FleetClient, upstream: Upstream) -> None:
    upstream.shut()
    start(state="unhealthy")
    submit(fleet, "r1")
    upstream.open()
    fleet.until_finished()
    assert fleet.answers["r1"].text == "one two three"


def test_a_request_over_which_the_upstream_always_fails_is_given_up_with_its_code(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    upstream.act = _fail
    start()
    submit(fleet, "r1")
    fleet.until_finished()
    finish = fleet.answers["r1"].finish
    assert finish is not None
    assert (finish.error_code, len(upstream.calls)) == ("upstream_error", 3)
    assert "tried 3 times" in finish.error_message
    assert "Traceback" not in finish.error_message


async def _break_off(call: Call) -> None:
    await call.start()
    await call.send(piece("one"))
    await call.send(piece(" two"))
    call.drop()


async def _end_without_a_word(call: Call) -> None:
    await call.start()
    await call.send(piece("one") + frame({"error": {"message": "out of memory"}}))
    await call.writer.drain()
    call.drop()


async def _send_garbage(call: Call) -> None:
    await call.start()
    await call.send(piece("one") + b"data: {garbage\n\n")
    await call.until_gone()


async def _hang(call: Call) -> None:
    await call.start()
    await call.send(piece("one"))
    await call.send(b": still here\n\n")
    await call.until_gone()


def test_an_answer_that_broke_off_goes_on_where_the_upstream_gives_the_same_again(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    start(upstream_gap_s=3.0)
    for trouble in (_break_off, _end_without_a_word, _send_garbage, _hang):
        num_before = len(upstream.calls)

        async def recover(call: Call, trouble: Act = trouble, num_before: int = num_before) -> None:
            await (trouble(call) if len(upstream.calls) == num_before + 1 else call.say("on", "e tw", "o thr", "ee"))

        upstream.act = recover
        name = trouble.__name__
        submit(fleet, name)
        fleet.until_finished()
        answer = fleet.answers[name]
        assert (answer.text, answer.attempts) == ("one two three", {1, 2})
        assert upstream.calls[-2].body == upstream.calls[-1].body
        assert event_of(fleet, name).attempts == 2


def test_an_answer_that_broke_off_ends_with_an_error_where_the_upstream_gives_another_one(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    async def differ(call: Call) -> None:
        await (_break_off(call) if len(upstream.calls) == 1 else call.say("one", " thousand"))

    upstream.act = differ
    start()
    submit(fleet, "r1")
    fleet.until_finished()
    answer = fleet.answers["r1"]
    assert answer.finish is not None
    assert (answer.text, answer.finish.error_code) == ("one two", "upstream_interrupted")
    assert "another one" in answer.finish.error_message


def test_an_upstream_that_sends_no_first_token_in_time_is_given_up(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    async def only_signs_of_life(call: Call) -> None:
        await call.start()
        await call.send(frame({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        await call.until_gone()

    upstream.act = only_signs_of_life
    start(upstream_first_token_s=0.3)
    submit(fleet, "r1")
    fleet.until_finished()
    finish = fleet.answers["r1"].finish
    assert finish is not None
    assert finish.error_code == "upstream_timeout"
    assert "first token within 0.3 s" in finish.error_message


def test_characters_that_are_cut_in_two_and_tokens_that_nobody_sees_are_taken_as_they_are(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    async def cut(call: Call) -> None:
        await call.start()
        await call.send(frame({"choices": [{"delta": {"reasoning_content": "hm"}}]}))
        for byte in piece("€ 😀") + piece("\u00e9"):
            await call.send(bytes([byte]))
        await call.end("length", usage=None)

    upstream.act = cut
    start()
    submit(fleet, "r1")
    fleet.until_finished()
    answer = fleet.answers["r1"]
    assert answer.finish is not None
    assert (answer.text, answer.finish.reason) == ("€ 😀é", "length")
    assert (answer.finish.prompt_tokens, answer.finish.completion_tokens) == (4, 3)


def test_a_killed_replica_loses_nothing_and_another_goes_on_exactly(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    words = [f" w{i}" for i in range(30)]

    async def stop_half_way_at_first(call: Call) -> None:
        if len(upstream.calls) > 6:
            await call.say(*words)
            return
        await call.start()
        for word in words[:15]:
            await call.send(piece(word))
        await call.until_gone()

    upstream.act = stop_half_way_at_first
    first = start("gpu-0", lease_s=1.0)
    submit(fleet, *(f"r{i}" for i in range(6)))
    fleet.until(lambda: all(len(answer.token_ids) > 20 for answer in fleet.answers.values()))
    os.kill(first.pid, signal.SIGKILL)
    start("gpu-1", lease_s=1.0)
    fleet.until_finished()
    assert {answer.text for answer in fleet.answers.values()} == {"".join(words)}
    snapshot = execute(fleet.client, fleet.queue.snapshot())
    assert (snapshot.depth, snapshot.running) == (0, 0)


def test_a_replica_obeys_as_an_engine_does_and_leaves_the_mode_to_the_server(
    start: Start, fleet: FleetClient, upstream: Upstream
) -> None:
    async def hold(call: Call) -> None:
        await call.start()
        await call.send(piece("a"))
        await call.until_gone()

    upstream.act = hold
    process = start()
    assert not process.send("set_mode", {"mode": "serial"}, 10).ok
    assert process.send("set_batch_size", {"max_batch_size": 2}, 10).ok
    submit(fleet, "r0", "r1", "r2")
    fleet.until(lambda: len(upstream.calls) == 2)
    assert process.send("pause", {}, 10).state == "paused"
    assert process.send("drain", {"drain_s": 0}, 10).ok
    fleet.until_state("gpu-0", "stopped")
    assert execute(fleet.client, fleet.queue.snapshot()).depth == 3
    fleet.until(lambda: all(call.gone.is_set() for call in upstream.calls))
    upstream.act = three_words
    assert process.send("resume", {}, 10).state == "ready"
    fleet.until(lambda: len(upstream.calls) > 2)


def test_a_replica_whose_key_is_missing_says_which_variable_to_set(
    start: Start, fleet: FleetClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ABSENT_API_KEY", raising=False)
    start(state="failed", upstream_key="ABSENT_API_KEY")
    status = fleet.status("gpu-0")
    assert status is not None
    assert "ABSENT_API_KEY" in status.detail
