"""Upstream servers, without one: addresses, events out of any pieces, the breaker, answers that go on exactly."""

import json
from contextlib import suppress
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.directory import TenantConfig
from inference.gateway.admission import Draft, check_length
from inference.gateway.errors import ContextLengthExceeded
from inference.gateway.served import LONGEST, load_model
from inference.messages import DeploymentSpec, InferenceRequest
from inference.upstream.address import AddressError, check_address, check_key_name
from inference.upstream.errors import BrokenOff, Failed, TooLong, UpstreamError, clean, read_message
from inference.upstream.events import MAX_EVENT_BYTES, Delta, EventReader, Usage, read_event
from inference.upstream.forwarded import ForwardedRequest
from inference.upstream.health import PAUSES_S, Health
from scheduling.core.answers import ClaimedRequest
from scheduling.core.sequence import SamplingParams
from scheduling.keys import Keys


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434/v1"),
        (" https://models.example.org/v1/ ", "https://models.example.org/v1"),
        ("http://[::1]:8000/openai/v1", "http://[::1]:8000/openai/v1"),
    ],
)
def test_an_address_is_kept_in_one_form(written: str, kept: str) -> None:
    assert check_address(written) == kept
    assert check_address(kept) == kept


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ("", "base address"),
        ("127.0.0.1:8000/v1", "http and https"),
        ("file:///etc/passwd", "http and https"),
        ("http:///v1", "no host"),
        ("http://host:99999/v1", "cannot be read"),
        ("http://user:secret@host/v1", "environment variable"),
        ("http://host/v1?key=1", "no query"),
        ("http://host/v1/chat/completions", "without /chat/completions"),
        ("http://host/v1\r\nx: y", "control characters"),
    ],
)
def test_an_address_that_cannot_be_used_is_explained_and_not_repeated(written: str, word: str) -> None:
    with pytest.raises(AddressError, match=word) as raised:
        check_address(written)
    assert "secret" not in str(raised.value)


def test_only_variables_that_hold_api_keys_can_be_named() -> None:
    assert check_key_name(" VLLM_API_KEY ") == "VLLM_API_KEY"
    assert check_key_name("") == ""
    for name in ("DATABASE_URL", "PENSTOCK_SECRET_KEY", "sk-0123456789", "_API_KEY"):
        with pytest.raises(AddressError, match="_API_KEY"):
            check_key_name(name)


FRAMES = [
    b": a comment\n\n",
    b'data: {"a": "\xe2\x82\xac \xf0\x9f\x98\x80"}\n\n',
    b"event: x\r\nid: 4\r\ndata:first\r\ndata: second\r\n\r\n",
    b"data: three\r\r",
    b"retry: 1\n\ndata: [DONE]\n\n",
]
DATA = ['{"a": "€ 😀"}'.encode(), b"first\nsecond", b"three", b"[DONE]"]


@given(cuts=st.lists(st.integers(0, sum(map(len, FRAMES))), max_size=12))
def test_events_are_the_same_wherever_their_bytes_are_cut(cuts: list[int]) -> None:
    whole, reader = b"".join(FRAMES), EventReader()
    borders = [0, *sorted(cuts), len(whole)]
    found = [data for a, b in pairwise(borders) for data in reader.push(whole[a:b])]
    assert found == DATA


def test_an_event_without_an_end_is_not_kept() -> None:
    in_a_line, in_lines = EventReader(), EventReader()
    in_a_line.push(b"data: " + b"x" * (MAX_EVENT_BYTES - 6))
    in_lines.push(b"data: x\n" * (MAX_EVENT_BYTES // 8))
    for reader in (in_a_line, in_lines):
        with pytest.raises(Failed, match="more than"):
            reader.push(b"data: xxxxxxx\n" * 2)


@pytest.mark.parametrize(
    ("fields", "delta"),
    [
        ({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}, Delta()),
        ({"choices": [{"delta": {"content": "a"}}]}, Delta("a", is_token=True)),
        ({"choices": [{"delta": {"content": None, "reasoning_content": "hm"}}]}, Delta(is_token=True)),
        ({"choices": [{"delta": {}, "finish_reason": "length"}]}, Delta(finish="length")),
        ({"choices": [{"text": "b", "finish_reason": "stop"}]}, Delta("b", is_token=True, finish="stop")),
        (
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}},
            Delta(usage=Usage(3, 2)),
        ),
        ({"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": 10**20}}, Delta()),
        ({"choices": "nonsense", "usage": 4}, Delta()),
    ],
)
def test_an_events_meaning_is_read_in_both_dialects(fields: dict[str, object], delta: Delta) -> None:
    assert read_event(json.dumps(fields).encode()) == delta


@given(st.binary(max_size=60))
def test_no_event_raises_anything_but_an_error_of_the_upstream(data: bytes) -> None:
    with suppress(UpstreamError):
        read_event(data)


def test_what_an_upstream_says_is_bounded_and_cleaned_and_never_holds_the_key() -> None:
    body = json.dumps({"error": {"message": "bad\x00\n\x1b[31m key sk-abc" + "x" * 999, "code": "c"}}).encode()
    message, code = read_message(body, secret="sk-abc")
    assert message.startswith("bad [31m key [key]x")
    assert len(message) <= 300
    assert code == "c"
    assert read_message(b'{"detail": "d"}') == ("d", "")
    assert read_message(b'{"error": "e"}') == ("e", "")
    assert read_message(b"<html>Traceback") == read_message(b"[1]") == read_message(b"\xff") == ("", "")
    assert clean("a\u2028b") == "a b"


def claim(sent: str, max_tokens: int = 20) -> ForwardedRequest:
    """A request of which an earlier attempt has sent a part."""
    request = InferenceRequest(
        id="r", model="m", tenant="t", priority=3, arrival_s=0.0, prompt_token_ids=[], max_tokens=max_tokens,
        sampling=SamplingParams(), forwarded=b"{}", estimated_prompt_tokens=4,
    )  # fmt: skip
    claimed = ClaimedRequest("r", msgspec.msgpack.encode(request), 2, [ord(c) for c in sent], 0)
    return ForwardedRequest(request, claimed, owner="o", now_s=0.0)


@given(text=st.text(max_size=30), sent=st.integers(0, 30), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_a_resumed_answer_gives_the_rest_and_nothing_twice(text: str, sent: int, cuts: list[int]) -> None:
    active = claim(text[:sent])
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    new = "".join(active.hear(text[a:b]) for a, b in pairwise(borders))
    assert text[:sent] + new == text
    assert active.has_caught_up


def test_another_answer_than_the_one_that_was_begun_is_told_at_its_first_difference() -> None:
    active = claim("one two")
    assert active.hear("one") == ""
    with pytest.raises(BrokenOff, match="another one"):
        active.hear(" three")


def test_a_journal_that_another_kind_of_engine_began_is_text_that_can_be_stored() -> None:
    request = claim("").request
    claimed = ClaimedRequest("r", msgspec.msgpack.encode(request), 2, [97, 0xD800, 0xDFFF, 0x110000, -1], 0)
    assert ForwardedRequest(request, claimed, owner="o", now_s=0.0).output.encode() == ("a" + 4 * "\ufffd").encode()


def test_an_answer_without_an_end_is_cut() -> None:
    active = claim("", max_tokens=2)
    assert active.hear("x" * 512) == "x" * 512
    with pytest.raises(TooLong, match="2 tokens"):
        active.hear("x")


def test_no_request_claims_more_than_any_model_reads_where_the_upstream_alone_knows_its_context() -> None:
    spec = DeploymentSpec(name="m", path="", backend="openai", upstream_url="http://127.0.0.1:1/v1")

    def draft(max_tokens: int) -> Draft:
        return Draft(
            id="r", endpoint="chat.completions", model=load_model(spec, Keys()), tenant=TenantConfig(name="acme"),
            prompt_token_ids=[], max_tokens=max_tokens, sampling=SamplingParams(), priority=3,
            estimated_prompt_tokens=4,
        )  # fmt: skip

    check_length(draft(LONGEST - 4))
    with pytest.raises(ContextLengthExceeded):
        check_length(draft(2**30))


def test_tokens_are_the_upstreams_own_count_where_it_gives_one() -> None:
    active = claim("")
    active.count_token(1.0)
    active.add("ab")
    assert (active.prompt_tokens, active.completion_tokens, active.used_tokens) == (4, 1, 5)
    active.usage = Usage(9, 6)
    assert (active.finish("stop").prompt_tokens, active.finish("stop").completion_tokens) == (9, 6)
    assert claim("eight ch").completion_tokens == 2


def test_after_a_failure_nothing_is_claimed_then_a_probe_and_one_request_have_to_succeed() -> None:
    now = [0.0]
    health = Health(lambda: now[0])
    assert health.is_probe_due
    assert health.room(8, []) == 0
    health.note_probe()
    assert health.room(8, [0.0] * 3) == 5
    health.note_failure("It failed.")
    health.note_failure("It failed again.")
    assert (health.problem, health.room(8, [])) == ("It failed again.", 0)
    health.note_probe()  # too early to believe it
    assert health.room(8, []) == 0
    now[0] = PAUSES_S[0]
    assert health.is_probe_due
    health.note_probe()
    assert (health.problem, health.room(8, [0.0])) == ("", 1)
    assert health.room(8, [now[0]]) == 0
    health.note_token(0.0)  # sent before the failure: proves nothing
    assert health.room(8, [0.0]) == 1
    health.note_token(now[0])
    assert health.room(8, [0.0]) == 7


def test_failures_in_a_row_are_waited_for_longer_and_an_upstream_is_heard_that_names_a_time() -> None:
    now = [0.0]
    health = Health(lambda: now[0])
    for pause_s in (*PAUSES_S, PAUSES_S[-1]):
        health.note_failure("It failed.")
        now[0] += pause_s * 0.99
        assert not health.is_probe_due
        now[0] += pause_s * 0.02
        assert health.is_probe_due
    health.note_failure("Busy.", pause_s=45)
    now[0] += 44
    assert not health.is_probe_due
