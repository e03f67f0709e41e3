"""`/v1` through a real server, Redis and queue: answers, errors, limits, as OpenAI's own client sees them."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from benchmarks.stack import MODEL, Stack, ended, running_stack
from benchmarks.tiny_checkpoint import MAX_MODEL_LEN, WORDS
from controlplane.api.drafting import INLINE_CHARACTERS
from tests.integration.gateway_support import Api, code_of, frames_of, text_of
from tests.patience import wait_until

TENANTS: dict[str, dict[str, int]] = {
    "alpha": {},
    "beta": {},
    "gamma": {"max_priority": 4},
    "delta": {"max_priority": 0},
    "few": {"rpm": 2},
    "small": {"tpm": 100},
    "single": {"concurrency": 1},
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(TENANTS) as stack, ended(stack.start_engine(tokens_per_step=2)):
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.api_keys["alpha"], max_retries=0) as client:
        yield client


def test_models_are_listed_and_retrieved(client: openai.OpenAI, api: Api) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "penstock"
    assert api.call("GET", f"/v1/models/{MODEL}/").json()["id"] == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="ba be", max_tokens=21)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 21
    assert whole.choices[0].finish_reason == "length"
    with client.completions.create(model=MODEL, prompt="ba be", max_tokens=21, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_chat_streams_role_text_reason_and_usage(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "ba"}]}],
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 9


def test_a_stream_ends_with_done(api: Api) -> None:
    response = api.complete(stream=True, max_tokens=3)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")


def test_prompts_may_be_tokens_and_default_lengths_are_openai_s(api: Api) -> None:
    body = api.complete(prompt=[10, 11, 12]).json()
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
    messages = [{"role": "user", "content": "ba"}]
    chat = api.call("POST", "/v1/chat/completions", json={"model": MODEL, "messages": messages}).json()
    assert chat["usage"]["completion_tokens"] == 512


async def test_200_requests_at_once_of_four_tenants_are_all_answered(stack: Stack) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> int:
        if number % 2:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "ba"}], max_tokens=20, stream=True
            )
            return sum([len((chunk.choices[0].delta.content or "").split()) async for chunk in stream])
        answer = await client.completions.create(model=MODEL, prompt="ba", max_tokens=20)
        return len(answer.choices[0].text.split())

    tenants = ("alpha", "beta", "gamma", "delta")
    clients = [
        openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=stack.api_keys[tenant], max_retries=0)
        for tenant in tenants
    ]
    counts = await asyncio.gather(*(ask(clients[i % 4], i) for i in range(200)))
    assert counts == [20] * 200
    for client in clients:
        await client.close()


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "none"}, 404, "model_not_found", "model"),
        ({"n": 2, "best_of": 4}, 400, "unsupported_parameter", "best_of"),
        ({"stop_token_ids": [10**6]}, 400, "invalid_value", "stop_token_ids[0]"),
        ({"foo": 2}, 400, "unknown_parameter", "foo"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"prompt": ""}, 400, "empty_prompt", "prompt"),
        ({"prompt": ["a", "b"]}, 400, "unsupported_value", "prompt"),
        ({"prompt": [10**6]}, 400, "invalid_value", "prompt"),
        ({"prompt": [True]}, 400, "invalid_value", "prompt[0]"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
        ({"priority": "urgent"}, 400, "invalid_value", "priority"),
        ({"priority": 6}, 400, "invalid_value", "priority"),
        ({"max_tokens": MAX_MODEL_LEN}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": [10] * MAX_MODEL_LEN}, 400, "context_length_exceeded", None),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(
    api: Api, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    response = api.complete(**fields)
    assert (response.status_code, code_of(response)) == (status, code)
    assert response.json()["error"]["param"] == param


def test_other_addresses_methods_and_sizes_are_refused(api: Api) -> None:
    response = api.call("GET", "/v1/embeddings")
    assert (response.status_code, code_of(response)) == (404, "unknown_url")
    response = api.call("GET", "/v1/completions")
    assert (response.status_code, code_of(response)) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["param"] is None
    response = api.complete(prompt="a" * 3_000_000)
    assert (response.status_code, code_of(response)) == (413, "request_too_large")
    chunks = (b"a" * 100_000 for _ in range(30))
    response = api.call("POST", "/v1/completions", content=chunks)
    assert (response.status_code, code_of(response)) == (413, "request_too_large")


def test_a_missing_or_wrong_key_is_refused(api: Api) -> None:
    response = api.call("GET", "/v1/models", tenant=None)
    assert (response.status_code, code_of(response)) == (401, "missing_api_key")
    response = api.call("GET", "/v1/models", tenant=None, headers={"Authorization": "Bearer ps-wrong"})
    assert (response.status_code, code_of(response)) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_priority_above_the_ceiling_is_forbidden(api: Api) -> None:
    response = api.complete("gamma", priority="normal")
    assert (response.status_code, code_of(response)) == (403, "priority_not_allowed")
    for tenant, priority in (("gamma", "low"), ("gamma", 5), ("delta", "critical"), ("delta", 0)):
        assert api.complete(tenant, priority=priority).status_code == 200


def test_a_sane_request_id_comes_back_and_others_are_replaced(api: Api) -> None:
    assert api.complete().headers["x-request-id"].startswith("req_")
    response = api.call("GET", "/v1/models", headers={"X-Request-Id": "trace-1:a"})
    assert response.headers["x-request-id"] == "trace-1:a"
    response = api.call("GET", "/v1/models", headers={"X-Request-Id": "a b"})
    assert response.headers["x-request-id"].startswith("req_")


def test_requests_per_minute_are_limited(api: Api) -> None:
    first = api.complete("few")
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert api.complete("few").status_code == 200
    refused = api.complete("few")
    assert (refused.status_code, code_of(refused)) == (429, "requests_per_minute_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_tokens_per_minute_are_limited_and_unused_ones_given_back(api: Api) -> None:
    refused = api.complete("small", max_tokens=200)
    assert (refused.status_code, code_of(refused)) == (400, "request_exceeds_tokens_per_minute")
    assert api.complete("small", max_tokens=80).status_code == 200
    refused = api.complete("small", max_tokens=80)
    assert (refused.status_code, code_of(refused)) == (429, "tokens_per_minute_exceeded")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_slot_is_free_again_after_the_end(api: Api) -> None:
    for _ in range(3):
        assert api.complete("single").status_code == 200
        wait_until(lambda: api.snapshot().running == 0)


def test_a_prompt_too_long_to_tokenize_inline_is_served(api: Api) -> None:
    prompt = WORDS[0] * 1900
    assert len(prompt) > INLINE_CHARACTERS
    assert api.complete(prompt=prompt, max_tokens=1).json()["usage"]["prompt_tokens"] == 1900


def test_a_stream_has_every_token_once(api: Api) -> None:
    response = api.complete(stream=True, max_tokens=300)
    whole = api.complete(max_tokens=300).json()["choices"][0]["text"]
    assert text_of(response.text) == whole
    assert len(frames_of(response.text)) > 1


def test_probes_and_metrics_tell_of_the_fleet(api: Api) -> None:
    assert api.call("GET", "/healthz", None).json() == {"status": "ok"}
    ready = api.call("GET", "/readyz", None)
    assert ready.status_code == 200
    assert {name for name, check in ready.json()["checks"].items() if check["ok"]} == {
        "redis",
        "database",
        "configuration",
        "models",
        "replicas",
        "accepting",
    }
    metrics = api.call("GET", "/metrics", None)
    assert metrics.headers["x-request-id"]
    names = {line.split("{")[0].split(" ")[0] for line in metrics.text.splitlines() if not line.startswith("#")}
    assert {
        "penstock_num_requests_running",
        "penstock_num_requests_waiting",
        "penstock_kv_cache_usage_perc",
        "penstock_generation_tokens_total",
        "penstock_num_preemptions_total",
        "penstock_backpressure_level",
        "penstock_replica_state",
        "penstock_requests_refused_total",
    } <= names
    families = {line.split(" ")[2] for line in metrics.text.splitlines() if line.startswith("# TYPE")}
    assert {
        "penstock_time_to_first_token_seconds",
        "penstock_time_per_output_token_seconds",
        "penstock_e2e_request_latency_seconds",
        "penstock_request_queue_time_seconds",
        "penstock_prompt_tokens_total",
        "penstock_request_success_total",
    } <= families
    assert 'tenant="other"' in metrics.text
