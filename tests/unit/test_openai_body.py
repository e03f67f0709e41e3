"""Bodies of OpenAI's dialect: what is accepted, and that what is not is refused by name."""

from typing import Any

import msgspec
import pytest

from controlplane.api.openai.body import HARMLESS, ChatBody, CompletionBody, read_body
from controlplane.api.sampling import read_sampling, refuse_what_polling_lacks
from inference.gateway.errors import InvalidRequest
from scheduling.core.sequence import SamplingParams

COMPLETION = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def complete(**fields: Any) -> CompletionBody:
    return read_body(msgspec.json.encode({**COMPLETION, **fields}), CompletionBody)


def chat(**fields: Any) -> ChatBody:
    return read_body(msgspec.json.encode({**CHAT, **fields}), ChatBody)


def test_every_supported_parameter_is_read() -> None:
    body = complete(
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        stop=["a", "b"],
        seed=-3,
        ignore_eos=True,
        user="u",
        stream=True,
        stream_options={"include_usage": True},
        priority="high",
        deadline_ms=1500,
        n=3,
        best_of=3,
        presence_penalty=-2,
        frequency_penalty=0.5,
        logit_bias={"17": -100, "5": 1.5},
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.2,
        min_tokens=2,
        stop_token_ids=[3],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=4,
    )
    assert (body.max_tokens, body.stop, body.seed, body.ignore_eos) == (5, ["a", "b"], -3, True)
    assert body.stream_options is not None
    assert body.stream_options.include_usage
    sampling = read_sampling(body, vocab_size=18, max_tokens=5)
    assert sampling == SamplingParams(
        temperature=0.5, top_p=0.9, seed=2**63 - 3, stop=("a", "b"), ignore_eos=True, top_k=40, min_p=0.1,
        repetition_penalty=1.2, presence_penalty=-2.0, frequency_penalty=0.5, logit_bias=((5, 1.5), (17, -100.0)),
        min_tokens=2, stop_token_ids=(3,), include_stop=True, skip_special_tokens=False, logprobs=4,
    )  # fmt: skip


def test_options_are_read_beside_one_that_asks_for_nothing() -> None:
    assert complete(logit_bias={"5": 1}, echo=False).logit_bias == {5: 1.0}


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, None), ({"logprobs": False}, None), ({"logprobs": 0}, 0), ({"logprobs": 20}, 20)]
)
def test_log_probabilities_of_completions_are_a_number(fields: dict[str, Any], expected: int | None) -> None:
    assert read_sampling(complete(**fields), vocab_size=9, max_tokens=5).logprobs == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 7}, 7)],
)
def test_log_probabilities_of_chats_are_a_word_and_a_number(fields: dict[str, Any], expected: int | None) -> None:
    assert read_sampling(chat(**fields), vocab_size=9, max_tokens=5).logprobs == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"9": 1}}, "logit_bias.9"),
        ({"stop_token_ids": [1, 9]}, "stop_token_ids[1]"),
        ({"min_tokens": 6}, "min_tokens"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_what_does_not_fit_model_or_request_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_sampling(complete(**body), vocab_size=9, max_tokens=5)
    assert caught.value.param == param


def test_likely_tokens_without_log_probabilities_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_sampling(chat(top_logprobs=2), vocab_size=9, max_tokens=5)
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("body", "param"),
    [(complete(n=2), "n"), (complete(logprobs=0), "logprobs"), (chat(logprobs=True), "logprobs")],
)
def test_a_submitted_request_has_one_plain_answer(body: CompletionBody | ChatBody, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        refuse_what_polling_lacks(body)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
    refuse_what_polling_lacks(complete(n=1, logprobs=False))


@pytest.mark.parametrize("prompt", ["text", [1, 2, 3], ["one text"], [[1, 2]]])
def test_a_prompt_is_a_text_or_tokens(prompt: Any) -> None:
    assert complete(prompt=prompt).prompt == prompt


def test_null_is_the_default_of_every_parameter() -> None:
    names = [name for name in CompletionBody.__struct_fields__ if name not in ("model", "prompt")]
    assert complete(**dict.fromkeys(names)) == complete()


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_options_that_ask_for_nothing_are_accepted(name: str) -> None:
    for value in (None, *HARMLESS[name]):
        assert complete(**{name: value}) == complete()
        if name not in ChatBody.__struct_fields__:
            assert chat(**{name: value}) == chat()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_logprobs", 3),
        ("echo", True),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("suffix", "x"),
    ],
)
def test_unsupported_options_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(**{name: value})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown_parameter"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"foo": True}}, "stream_options.foo", "unknown_parameter"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
        ({"deadline_ms": 0}, "deadline_ms", "invalid_value"),
        ({"model": 5}, "model", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"best_of": "x"}, "best_of", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"top_k": 1.5}, "top_k", "invalid_value"),
        ({"min_p": 1.1}, "min_p", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
        ({"min_tokens": -1}, "min_tokens", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "invalid_value"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_type"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"n": 1, "model": "\xff"}', "invalid_json"),
        (b'{"model": "m"}', "missing_required_parameter"),
    ],
)
def test_a_body_that_is_no_request_is_refused(raw: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_body(raw, CompletionBody)
    assert caught.value.code == code


def test_messages_are_texts_or_text_parts() -> None:
    body = chat(messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}]}])
    assert isinstance(body.messages[0].content, list)
    assert body.messages[0].content[0].text == "a"


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": None}
    assert chat(messages=[*CHAT["messages"], answer]).messages[1].content == "x"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, None),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": [1]}, "messages[0].tool_calls"),
        ({"content": "x"}, "messages[0].role"),
    ],
)
def test_messages_of_other_kinds_are_refused(message: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[message])
    if param is not None:
        assert caught.value.param == param


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        chat(messages=[])


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(InvalidRequest):
        read_body(b'{"model": "m", "prompt": "\\ud800"}', CompletionBody)
