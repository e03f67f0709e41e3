"""The official OpenAI client against the whole system."""

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.acceptance.whole_system import MODEL, WholeSystem
from tests.patience import wait_until

pytestmark = pytest.mark.acceptance
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is a penstock?"}]
USER = "one-of-two-hundred"
ANSWER = "A penstock is a pipe with a gate"


def test_models_are_listed(system: WholeSystem) -> None:
    assert [model.id for model in system.client().models.list()] == [MODEL]


def test_a_chat_is_answered_in_readable_english(system: WholeSystem) -> None:
    answer = system.client().chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content is not None
    assert choice.message.content.startswith(ANSWER)
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_says_the_same_piece_by_piece(system: WholeSystem) -> None:
    client = system.client()
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)

    def num_pieces() -> int:
        pieces, usage = [], None
        for chunk in client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, stream=True, stream_options={"include_usage": True}
        ):
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage
        assert "".join(pieces) == whole.choices[0].message.content
        assert usage == whole.usage
        return len(pieces)

    # What comes while the web process has no time is one piece.
    wait_until(lambda: num_pieces() > 5, "an answer comes in pieces")


def test_a_completion_goes_on_with_the_prompt(system: WholeSystem) -> None:
    answer = system.client().completions.create(model=MODEL, prompt="Once upon a time,", max_tokens=12, temperature=0)
    assert len(answer.choices[0].text.split()) > 5
    assert answer.choices[0].finish_reason == "length"


def test_a_streamed_completion_ends_at_a_stop_word(system: WholeSystem) -> None:
    stream = system.client().completions.create(
        model=MODEL, prompt="Once upon a time,", max_tokens=60, temperature=0, stop=["."], stream=True
    )
    chunks = list(stream)
    assert "." not in "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_wrong_key_and_an_unknown_model_are_refused_as_the_client_expects(system: WholeSystem) -> None:
    with pytest.raises(openai.AuthenticationError):
        system.client().with_options(api_key="ps-wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        system.client().completions.create(model="nobody", prompt="x")


async def test_the_async_client_chats_and_streams(system: WholeSystem) -> None:
    async with system.aclient() as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, stream=True)
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert streamed == answer.choices[0].message.content


async def test_two_hundred_requests_at_once_from_four_tenants_are_all_answered_and_recorded_once(
    system: WholeSystem,
) -> None:
    tenants = system.keys()
    clients = [system.aclient(tenant) for tenant in tenants]
    assert len(clients) == 4

    async def ask(number: int) -> str:
        chats = clients[number % 4].chat.completions
        if number % 2:
            answer = await chats.create(model=MODEL, messages=MESSAGES, temperature=0, user=USER)
            return answer.choices[0].message.content or ""
        stream = await chats.create(model=MODEL, messages=MESSAGES, temperature=0, user=USER, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    answers = await asyncio.gather(*(ask(number) for number in range(200)))
    for client in clients:
        await client.close()
    assert len(set(answers)) == 1
    assert answers[0].startswith(ANSWER)
    wait_until(lambda: system.num_records(USER) >= 200, "the history has every request")
    assert system.num_records(USER) == 200
    wait_until(
        lambda: int(str(system.rows("SELECT max(batch_size_max) FROM inference_batchrecord")[0][0])) > 8,
        "requests ran together",
    )
