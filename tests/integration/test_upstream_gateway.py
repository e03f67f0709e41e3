"""One Penstock as the upstream of another, from the official client to the last token, with kill -9 in between."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import msgspec
import openai
import pytest
import redis

from benchmarks.stack import MODEL, PREFIX, ROOT, Stack, ended, running_stack
from inference.messages import DeploymentSpec, ReplicaStatus, RequestEvent
from inference.worker.process import EngineProcess
from inference.worker.spec import EngineSpec
from scheduling.keys import Keys
from tests.patience import wait_until

KEYS = Keys(PREFIX)
FRONT = "forwarded"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Stack]:
    """A Penstock that says a word every few milliseconds."""
    with running_stack({"upstream": {}}) as stack, ended(stack.start_engine(tokens_per_step=1, step_s=0.003)):
        yield stack


@pytest.fixture(scope="module")
def front(upstream: Stack) -> Iterator[Stack]:
    """A Penstock to which the other one is a model's server."""
    with running_stack({"team": {}}) as stack:
        command = [sys.executable, "manage.py", "add_upstream", FRONT, f"{upstream.url}/v1", "--model", MODEL]
        command += ["--key-variable", "BEHIND_API_KEY", "--sizing", "fixed", "--concurrency", "32"]
        subprocess.run(command, cwd=ROOT, env=stack.environment, check=True, capture_output=True)
        yield stack


@pytest.fixture
def store(front: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(front.redis.url) as client:
        yield client


@pytest.fixture
def client(front: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key=front.api_keys["team"], max_retries=0) as client:
        yield client


@contextmanager
def replica(
    name: str, front: Stack, upstream: Stack, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EngineProcess]:
    """A replica that forwards, and is known to the front's web process."""
    monkeypatch.setenv("BEHIND_API_KEY", upstream.api_keys["upstream"])
    packed = wait_until(lambda: store.hget(KEYS.deployments, FRONT))
    assert isinstance(packed, bytes)
    deployment = msgspec.json.decode(packed, type=DeploymentSpec)
    spec = EngineSpec(
        deployment=deployment,
        replica=name,
        redis_url=front.redis.url,
        key_prefix=PREFIX,
        lease_s=1.0,
        log_level="ERROR",
    )
    process = EngineProcess([sys.executable, "-m", "inference.upstream"], spec)
    try:
        wait_until(lambda: (status := status_of(store, name)) is not None and status.state == "ready")
        yield process
    finally:
        process.kill()
        assert process.wait(10) is not None


def status_of(store: redis.Redis, name: str) -> ReplicaStatus | None:
    packed = store.get(KEYS.replica(name))
    assert packed is None or isinstance(packed, bytes)
    return None if packed is None else msgspec.msgpack.decode(packed, type=ReplicaStatus)


def ends_of(store: redis.Redis) -> list[RequestEvent]:
    entries: list[tuple[bytes, dict[bytes, bytes]]] = store.xrange(KEYS.history)  # type: ignore[assignment]
    found = [one for _, fields in entries for one in msgspec.msgpack.decode(fields[b"m"])]
    return [msgspec.convert(one, RequestEvent) for one in found if one["type"] == "request"]


def test_a_client_of_the_front_gets_what_a_client_of_the_upstream_gets(
    front: Stack, upstream: Stack, store: redis.Redis, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        replica("one", front, upstream, store, monkeypatch),
        openai.OpenAI(base_url=f"{upstream.url}/v1", api_key=upstream.api_keys["upstream"]) as direct,
    ):
        asked = {"messages": [{"role": "user", "content": "ba be bi"}], "max_tokens": 12, "seed": 3}
        wanted = direct.chat.completions.create(model=MODEL, **asked)  # type: ignore[call-overload]
        whole = client.chat.completions.create(model=FRONT, **asked, n=2)  # type: ignore[call-overload]
        assert [choice.message.content for choice in whole.choices] == [wanted.choices[0].message.content] * 2
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.prompt_tokens == wanted.usage.prompt_tokens
        assert whole.usage.completion_tokens == 24

        chunks = list(
            client.chat.completions.create(
                model=FRONT,
                **asked,
                stream=True,
                stream_options={"include_usage": True},  # type: ignore[call-overload]
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == wanted.choices[0].message.content
        assert chunks[-1].usage == wanted.usage
        plain = client.completions.create(model=FRONT, prompt="ba be bi", max_tokens=5)
        assert (
            plain.choices[0].text
            == direct.completions.create(model=MODEL, prompt="ba be bi", max_tokens=5).choices[0].text
        )

        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=FRONT, **asked, logprobs=True)  # type: ignore[call-overload]
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "logprobs")
        with pytest.raises(openai.BadRequestError) as too_long:
            client.completions.create(model=FRONT, prompt="ba", max_tokens=100_000)
        assert too_long.value.code == "context_length_exceeded"
        wait_until(lambda: len(ends_of(store)) >= 5)
        counts = {
            (end.prompt_tokens, end.completion_tokens) for end in ends_of(store) if end.endpoint == "chat.completions"
        }
        assert counts == {(wanted.usage.prompt_tokens, 12)}


def test_streams_go_on_exactly_when_their_replica_is_killed_and_nothing_is_lost(
    front: Stack, upstream: Stack, store: redis.Redis, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: dict[int, str] = {}

    def read(number: int) -> None:
        stream = client.completions.create(
            model=FRONT, prompt="ba " * (number + 1), max_tokens=300, seed=1, stream=True
        )
        for chunk in stream:
            texts[number] = texts.get(number, "") + chunk.choices[0].text

    readers = [Thread(target=read, args=(number,)) for number in range(8)]
    with replica("two", front, upstream, store, monkeypatch) as first:
        for reader in readers:
            reader.start()
        wait_until(lambda: len(texts) == 8 and all(len(text) > 20 for text in list(texts.values())))
        os.kill(first.pid, signal.SIGKILL)
        with replica("three", front, upstream, store, monkeypatch):
            for reader in readers:
                reader.join()
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key=upstream.api_keys["upstream"]) as direct:
        wanted = direct.completions.create(model=MODEL, prompt="ba", max_tokens=300, seed=1).choices[0].text
    assert set(texts.values()) == {wanted}
