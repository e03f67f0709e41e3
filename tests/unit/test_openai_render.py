"""Answers as bytes: every frame is OpenAI's, and text survives whatever it holds."""

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from controlplane.api.openai.render import DONE, ChatRendering, CompletionRendering, error_frame
from inference.messages import Finish

FINISH = Finish("stop", 3, 7)


def frames(raw: bytes) -> list[Any]:
    parts = raw.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") for part in parts)
    return [json.loads(part[6:]) for part in parts if part != b"data: [DONE]"]


@given(st.text())
def test_any_text_comes_through_a_frame(text: str) -> None:
    for kind in (CompletionRendering, ChatRendering):
        render = kind(id="i", created=1, model='m"\\', include_usage=True)
        (frame,) = frames(render.text(text))
        (choice,) = frame["choices"]
        assert (choice["text"] if "text" in choice else choice["delta"]["content"]) == text
        assert frame["model"] == 'm"\\'


def test_a_completion_frame_has_openai_s_fields() -> None:
    render = CompletionRendering(id="cmpl-1", created=5, model="m")
    choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}
    assert frames(render.text("a")) == [
        {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m", "choices": [choice]}
    ]


def test_a_chat_stream_begins_with_the_role_and_ends_with_reason_usage_and_done() -> None:
    render = ChatRendering(id="c", created=5, model="m", include_usage=True)
    raw = render.start() + render.text("a") + render.end(FINISH)
    assert raw.endswith(DONE)
    first, text, last, usage = frames(raw)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text["choices"][0]["delta"] == {"content": "a"}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    assert all(frame["usage"] is None for frame in (first, text, last))
    assert {frame["object"] for frame in (first, text, last, usage)} == {"chat.completion.chunk"}


def test_usage_is_left_out_where_it_was_not_asked_for() -> None:
    render = CompletionRendering(id="c", created=5, model="m")
    (last,) = frames(render.end(FINISH))
    assert "usage" not in last
    assert last["choices"][0]["finish_reason"] == "stop"


def test_whole_answers_are_openai_s_objects() -> None:
    completion = json.loads(CompletionRendering(id="c", created=5, model="m").whole("hé", FINISH))
    assert completion["object"] == "text_completion"
    assert completion["choices"][0]["text"] == "hé"
    chat = json.loads(ChatRendering(id="c", created=5, model="m").whole("hé", FINISH))
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "hé", "refusal": None}
    assert chat["usage"]["total_tokens"] == 10


def test_an_error_frame_is_an_event_of_its_own() -> None:
    assert error_frame(msgspec.json.encode({"error": {}})) == b'data: {"error":{}}\n\n'
