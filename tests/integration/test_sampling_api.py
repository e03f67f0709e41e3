"""Sampling options from OpenAI's own client to a real engine and back."""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
import torch
import transformers

from benchmarks.stack import MODEL, Stack, running_stack
from inference.tokenization import Tokenizer
from scheduling.store import execute
from tests.integration.engines import Engines
from tests.integration.gateway_support import KEYS, QUEUE, Api, code_of
from tests.patience import PATIENCE_S, wait_until

PROMPT = [10, 300, 450, 12]
CHAT: list[Any] = [{"role": "user", "content": "ba be"}]
TENANTS: dict[str, dict[str, int]] = {"alpha": {}, "pair": {"concurrency": 2}, "small": {"tpm": 100}}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(TENANTS) as stack:
        yield stack


@pytest.fixture(scope="module")
def checkpoint(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the web process knows, with weights."""
    path = tmp_path_factory.mktemp("model")
    shutil.copytree(stack.checkpoint, path, dirs_exist_ok=True)
    torch.manual_seed(1)
    config = transformers.LlamaConfig.from_pretrained(path, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.initializer_range, config.eos_token_id = 0.3, 0
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engines(stack: Stack, checkpoint: Path) -> Iterator[Engines]:
    with Engines(checkpoint, stack.redis.url, KEYS) as engines:
        engines.start()
        yield engines


@pytest.fixture
def client(stack: Stack, engines: Engines) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.api_keys["alpha"], max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, max_tokens: int = 12, **options: Any) -> Any:
    options = {"extra_body": {"ignore_eos": True}, "seed": 5, **options}
    return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=max_tokens, **options)


def text_of(client: openai.OpenAI, **options: Any) -> str:
    text: str = complete(client, **options).choices[0].text
    return text


def test_log_probabilities_of_a_completion_are_the_model_s(client: openai.OpenAI, checkpoint: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = Tokenizer.load(checkpoint)
    choice = complete(client, temperature=0, logprobs=3).choices[0]
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        expected = torch.log_softmax(model(out).logits[0, len(PROMPT) - 1 : -1].double(), -1)
    tokens, shown = out[0, len(PROMPT) :].tolist(), choice.logprobs
    best = expected.topk(3)
    assert shown.token_logprobs == pytest.approx([float(expected[i, t]) for i, t in enumerate(tokens)], abs=1e-4)
    for i, top in enumerate(shown.top_logprobs):
        assert list(top.values()) == pytest.approx(best.values[i].tolist(), abs=1e-4)
        assert next(iter(top)) == shown.tokens[i]
    pieces = [tokenizer.token_bytes(token) for token in tokens]
    assert b"".join(pieces).decode(errors="replace") == choice.text
    for piece, token, offset in zip(pieces, shown.tokens, shown.text_offset, strict=True):
        if token.startswith("bytes:"):
            assert token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
        else:
            assert choice.text[offset:].startswith(token)


def test_log_probabilities_of_a_chat_are_the_same_whole_and_streamed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 30, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(**options, top_logprobs=2).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content
    text = b"".join(bytes(entry.bytes or []) for entry in whole.logprobs.content).decode(errors="replace")
    assert text == whole.message.content
    assert {len(entry.top_logprobs) for entry in whole.logprobs.content} == {2}
    streamed, shown = "", list[Any]()
    with client.chat.completions.create(**options, top_logprobs=2, stream=True) as stream:
        for chunk in stream:
            streamed += chunk.choices[0].delta.content or ""
            if chunk.choices[0].logprobs is not None:
                shown += chunk.choices[0].logprobs.content or []
    assert streamed == whole.message.content
    assert shown == whole.logprobs.content
    plain = client.chat.completions.create(**options).choices[0]
    assert plain.logprobs is not None
    assert plain.logprobs.content is not None
    assert plain.logprobs.content[0].top_logprobs == []


def test_tokens_after_a_stop_string_are_not_shown(client: openai.OpenAI) -> None:
    text = text_of(client)
    at = next(i for i in range(4, len(text)) if text.index(text[i : i + 3]) == i)
    choice = complete(client, stop=[text[at : at + 3]], logprobs=0).choices[0]
    assert (choice.text, choice.finish_reason) == (text[:at], "stop")
    assert all(offset < at for offset in choice.logprobs.text_offset)


def test_several_answers_are_those_of_their_seeds_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = complete(client, n=3)
    alone = [text_of(client, seed=seed) for seed in (5, 6, 7)]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.text for choice in whole.choices] == alone
    assert len(set(alone)) == 3
    assert whole.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 4, "completion_tokens": 36, "total_tokens": 40,
    }  # fmt: skip
    texts, reasons = defaultdict[int, str](str), dict[int, str]()
    with complete(client, n=3, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = stream
    for chunk in chunks:
        (choice,) = chunk.choices
        assert choice.index not in reasons
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert [texts[i] for i in range(3)] == alone
    assert reasons == dict.fromkeys(range(3), "length")
    assert last.usage.completion_tokens == 36
    assert {chunk.id for chunk in chunks} == {last.id}


def test_chats_have_several_answers_too(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=5, n=2, stream=True) as stream:
        chunks = list(stream)
    assert [c.choices[0].index for c in chunks if c.choices[0].delta.role == "assistant"] == [0, 1]
    assert sorted(c.choices[0].index for c in chunks if c.choices[0].finish_reason) == [0, 1]


def test_cancelling_one_of_several_answers_cancels_all(stack: Stack, client: openai.OpenAI) -> None:
    api = Api(stack)
    with complete(client, max_tokens=1900, n=3, stream=True) as stream:
        chunks = iter(stream)
        request_id = next(chunks).id
        assert api.call("DELETE", f"/api/v1/requests/{request_id}").json()["was"] == "running"
        with pytest.raises(openai.APIError, match="cancelled"):
            list(chunks)
    wait_until(lambda: api.snapshot().running == 0)


def test_a_client_that_leaves_cancels_all_answers(stack: Stack, client: openai.OpenAI) -> None:
    api = Api(stack)
    with api.hanging(n=3, max_tokens=1900, ignore_eos=True):
        wait_until(lambda: api.snapshot().running == 3)
    wait_until(lambda: api.snapshot().running == 0)


def test_each_answer_counts_against_the_tenant_s_limits(stack: Stack, engines: Engines) -> None:
    api = Api(stack)
    assert api.complete("pair", n=2, max_tokens=3).status_code == 200
    wait_until(lambda: api.snapshot().running == 0)
    refused = api.complete("pair", n=3, max_tokens=3)
    assert (refused.status_code, code_of(refused)) == (400, "request_exceeds_concurrency")
    wait_until(lambda: api.snapshot().running == 0 and api.complete("pair", n=2, max_tokens=3).status_code == 200)
    refused = api.complete("small", prompt=PROMPT, n=2, max_tokens=50)
    assert (refused.status_code, code_of(refused)) == (400, "request_exceeds_tokens_per_minute")


def test_options_change_what_is_said(client: openai.OpenAI, checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    greedy = text_of(client, temperature=0)
    only = {"ignore_eos": True}
    assert text_of(client, extra_body={**only, "top_k": 1}) == greedy
    assert text_of(client, extra_body={**only, "min_p": 1.0}) == greedy
    assert text_of(client, extra_body={**only, "top_k": 50}) != greedy
    assert text_of(client, logit_bias={"300": 100}) == tokenizer.decode([300] * 12)
    long: dict[str, Any] = {"temperature": 0, "max_tokens": 60}
    plain = text_of(client, **long)
    for option in ({"frequency_penalty": 2}, {"presence_penalty": 2}):
        assert text_of(client, **long, **option) != plain
    assert text_of(client, **long, extra_body={**only, "repetition_penalty": 1.5}) != plain


def test_stop_tokens_end_an_answer_as_asked(client: openai.OpenAI, checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    stop: dict[str, Any] = {"stop_token_ids": [300]}
    answer = complete(client, logit_bias={"300": 100}, extra_body=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage.completion_tokens == 1
    included = complete(client, logit_bias={"300": 100}, extra_body={**stop, "include_stop_str_in_output": True})
    assert included.choices[0].text == tokenizer.decode([300])
    later = complete(client, logit_bias={"300": 100}, extra_body={**stop, "min_tokens": 5})
    assert later.usage.completion_tokens == 6
    special: dict[str, Any] = {"logit_bias": {"1": 100, "0": 90}, "max_tokens": 3}
    assert complete(client, **special).choices[0].text == ""
    shown = complete(client, **special, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert shown.choices[0].text == "<|system|>" * 3


def test_penalties_and_log_probabilities_outlive_the_engine(
    client: openai.OpenAI, engines: Engines, live: redis.Redis
) -> None:
    options: dict[str, Any] = {"max_tokens": 1200, "logprobs": 2, "frequency_penalty": 0.3}
    options["extra_body"] = {"ignore_eos": True, "repetition_penalty": 1.2}
    expected = complete(client, **options).choices[0]
    texts, tokens, values = "", list[str](), list[float]()
    with complete(client, **options, stream=True) as stream:
        for chunk in stream:
            choice = chunk.choices[0]
            texts += choice.text
            if choice.logprobs is not None:
                tokens += choice.logprobs.tokens
                values += choice.logprobs.token_logprobs
            if len(engines.started) == 1 and len(tokens) > 200:
                engines.started[0].kill()
                engines.started[0].wait(PATIENCE_S)
                assert sum(num for _, num in execute(live, QUEUE.expire(now=time.time() + 3600))) == 1
                engines.start(replica="gpu-1")
    assert len(engines.started) == 2
    assert texts == expected.text
    assert tokens == expected.logprobs.tokens
    assert values == pytest.approx(expected.logprobs.token_logprobs, abs=1e-3)


def test_an_idempotency_key_stands_for_all_answers(stack: Stack, engines: Engines) -> None:
    api = Api(stack)
    body = {"model": MODEL, "prompt": "ba", "n": 2, "max_tokens": 5, "temperature": 1.5}
    key = {"Idempotency-Key": "k-1"}
    first, second = (api.call("POST", "/v1/completions", json=body, headers=key).json() for _ in range(2))
    assert first["id"] == second["id"]
    assert [c["text"] for c in first["choices"]] == [c["text"] for c in second["choices"]]


def test_a_submitted_request_refuses_what_polling_cannot_show(stack: Stack) -> None:
    body = {"model": MODEL, "prompt": "ba", "n": 2}
    refused = Api(stack).call("POST", "/api/v1/requests", content=json.dumps(body))
    assert (refused.status_code, code_of(refused)) == (400, "unsupported_parameter")
