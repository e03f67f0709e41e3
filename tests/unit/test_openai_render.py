"""Answers as bytes: every frame is OpenAI's, and text survives whatever it holds."""

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from controlplane.api.openai.render import (
    DONE,
    ChatRendering,
    CompletionRendering,
    Heading,
    error_frame,
    render_end,
    render_whole,
)
from inference.messages import Finish

FINISH = Finish("stop", 3, 7)
HEADING = Heading(id="c", created=5, model="m")


def frames(raw: bytes) -> list[Any]:
    parts = raw.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") for part in parts)
    return [json.loads(part[6:]) for part in parts if part != b"data: [DONE]"]


@given(st.text(min_size=1))
def test_any_text_comes_through_a_frame(text: str) -> None:
    for kind in (CompletionRendering, ChatRendering):
        render = kind(Heading(id="i", created=1, model='m"\\', include_usage=True), 2)
        (frame,) = frames(render.text(text, []))
        (choice,) = frame["choices"]
        assert (choice["text"] if "text" in choice else choice["delta"]["content"]) == text
        assert choice["index"] == 2
        assert frame["model"] == 'm"\\'


def test_no_text_gives_no_frame() -> None:
    assert CompletionRendering(HEADING).text("", []) == b""


def test_a_completion_frame_has_openai_s_fields() -> None:
    choice = {"index": 0, "text": "a", "logprobs": None, "finish_reason": None}
    assert frames(CompletionRendering(HEADING).text("a", [])) == [
        {"id": "c", "object": "text_completion", "created": 5, "model": "m", "choices": [choice]}
    ]


def test_a_chat_stream_begins_with_the_role_and_ends_with_reason_usage_and_done() -> None:
    heading = Heading(id="c", created=5, model="m", include_usage=True)
    render = ChatRendering(heading)
    raw = render.start() + render.text("a", []) + render.last(FINISH)
    raw += render_end(heading, ChatRendering, [FINISH, FINISH])
    assert raw.endswith(DONE)
    first, text, last, usage = frames(raw)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text["choices"][0]["delta"] == {"content": "a"}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 14, "total_tokens": 17}
    assert all(frame["usage"] is None for frame in (first, text, last))
    assert {frame["object"] for frame in (first, text, last, usage)} == {"chat.completion.chunk"}


def test_usage_is_left_out_where_it_was_not_asked_for() -> None:
    (last,) = frames(CompletionRendering(HEADING).last(FINISH) + render_end(HEADING, CompletionRendering, [FINISH]))
    assert "usage" not in last
    assert last["choices"][0]["finish_reason"] == "stop"


def test_whole_answers_are_openai_s_objects() -> None:
    choice = CompletionRendering(HEADING).whole("hé", [], FINISH)
    completion = json.loads(render_whole(HEADING, CompletionRendering, [choice], [FINISH]))
    assert completion["object"] == "text_completion"
    assert completion["choices"][0]["text"] == "hé"
    choices = [ChatRendering(HEADING, i).whole("hé", [], FINISH) for i in range(2)]
    chat = json.loads(render_whole(HEADING, ChatRendering, choices, [FINISH, FINISH]))
    assert chat["object"] == "chat.completion"
    assert [choice["index"] for choice in chat["choices"]] == [0, 1]
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": "hé", "refusal": None}
    assert chat["usage"]["total_tokens"] == 17


def test_an_error_frame_is_an_event_of_its_own() -> None:
    assert error_frame(msgspec.json.encode({"error": {}})) == b'data: {"error":{}}\n\n'
