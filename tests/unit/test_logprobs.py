"""Log probabilities come back whole from portions of any cut, and are shown with the text that they belong to."""

from itertools import pairwise
from typing import cast

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from controlplane.api.openai.logprobs import TokenTrail
from inference.logprobs import keep_logprobs, read_logprobs
from inference.tokenization import Tokenizer
from scheduling.core.sequence import SamplingParams, TokenLogprob
from scheduling.keys import Keys

MANY = [TokenLogprob(i, -i / 8, ((i, -i / 8), (i + 1, -9.0))) for i in range(12)]
HELLO = {1: "Grü".encode()[:3], 2: "Grü".encode()[3:], 3: b"\xc3", 4: b"\x9fe", 5: b" gut", 9: b"</s>"}


def join(portions: list[tuple[int, int]]) -> list[TokenLogprob]:
    """What is read after these portions (from, to) were kept, in this order."""
    kept: dict[bytes, bytes] = {}
    for start, end in portions:
        write = keep_logprobs(Keys(), "m", "id", start, MANY[start:end])[0].args
        kept[write[2]] = write[3]
    return read_logprobs(Keys(), "m", "id").read([item for pair in kept.items() for item in pair])


@given(cuts=st.sets(st.integers(1, 11)), again=st.sets(st.integers(1, 11)))
def test_portions_of_two_owners_are_joined(cuts: set[int], again: set[int]) -> None:
    portions = []
    for places in (cuts, again):
        edges = [0, *sorted(places), 12]
        portions += list(pairwise(edges))
    assert join(portions) == MANY


def test_what_is_missing_ends_what_is_read() -> None:
    assert join([(0, 3), (5, 9)]) == MANY[:3]
    assert join([]) == []


class Vocabulary:
    """The two questions that a trail asks of a tokenizer."""

    def silent_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        return frozenset({9})

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        return HELLO[token_id]


def test_a_token_is_shown_once_the_text_that_it_begins_in_is() -> None:
    trail = TokenTrail(cast(Tokenizer, Vocabulary()), SamplingParams())
    trail.push([TokenLogprob(i, -1.0) for i in (1, 2)])
    assert [token.offset for token in trail.take("Gr")] == [0]
    assert trail.take("") == []
    trail.push([TokenLogprob(i, -1.0) for i in (3, 4, 5, 9)])
    assert [(t.measured.token_id, t.offset) for t in trail.take("üße")] == [(2, 2), (3, 3), (4, 3)]
    assert trail.take("") == [], "a stop string cut the rest off"


def test_parts_of_characters_are_named_by_their_bytes() -> None:
    trail = TokenTrail(cast(Tokenizer, Vocabulary()), SamplingParams())
    trail.push([TokenLogprob(3, -1.5, ((3, -1.5), (5, -2.0))), TokenLogprob(4, -0.5)])
    shown = trail.take("ße")
    assert trail.show_completion(shown) == {
        "text_offset": [0, 0],
        "token_logprobs": [-1.5, -0.5],
        "tokens": ["bytes:\\xc3", "bytes:\\x9f\\x65"],
        "top_logprobs": [{"bytes:\\xc3": -1.5, " gut": -2.0}, {"bytes:\\x9f\\x65": -0.5}],
    }
    entry = trail.show_chat(shown)["content"][0]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("\\xc3", [0xC3], -1.5)
    assert [top["token"] for top in entry["top_logprobs"]] == ["\\xc3", " gut"]


def test_an_impossible_token_has_a_number_that_json_can_write() -> None:
    trail = TokenTrail(cast(Tokenizer, Vocabulary()), SamplingParams())
    trail.push([TokenLogprob(5, float("-inf"))])
    assert msgspec.json.encode(trail.show_completion(trail.take(" gut"))["token_logprobs"]) == b"[-9999.0]"
