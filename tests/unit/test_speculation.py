"""Drafts repeat what the text repeats, change no token, and end by themselves where they do not pay."""

import random
from collections.abc import Sequence as Sequence_

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import PartResult, SamplingParams, Sequence, StepPart
from scheduling.core.speculation import Ask, NGramIndex, Speculation

EOS = 1


def make_sequence(tokens: list[int], output: int, name: str = "a", sampling: SamplingParams | None = None) -> Sequence:
    return Sequence(
        id=name, attempt=1, tenant="t", priority=3, arrival_s=0.0, tokens=list(tokens), num_prompt_tokens=len(tokens),
        max_tokens=output, sampling=sampling or SamplingParams(),
    )  # fmt: skip


def test_what_followed_before_is_proposed_the_longest_match_first() -> None:
    assert NGramIndex().propose([5, 6, 7, 8, 9, 5, 6, 7], 2) == (8, 9)
    assert NGramIndex().propose([1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 1, 2, 3, 4], 1) == (50,)
    assert NGramIndex().propose([1, 2, 50, 1, 2, 60, 1, 2], 1) == (60,)
    assert NGramIndex().propose([1, 2, 3, 4], 3) == ()
    assert NGramIndex().propose([4], 3) == ()


def test_a_run_that_repeats_goes_on_repeating() -> None:
    assert NGramIndex().propose([3, 7, 7, 7], 4) == (7, 7, 7, 7)
    assert NGramIndex().propose([1, 2, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)


@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=40), cuts=st.lists(st.integers(2, 40), max_size=5))
def test_an_index_kept_up_with_its_text_is_one_made_anew(tokens: list[int], cuts: list[int]) -> None:
    kept = NGramIndex()
    for cut in sorted(cuts):
        kept.propose(tokens[:cut], 1)
    assert kept.propose(tokens, 5) == NGramIndex().propose(tokens, 5)


class Model:
    """Gives each sequence the tokens of a given text, and verifies drafts as the engine does."""

    def __init__(self, texts: dict[str, list[int]]) -> None:
        self.texts = texts
        self.num_steps = 0

    def step(self, parts: list[StepPart]) -> list[PartResult]:
        self.num_steps += 1
        return [self._result(part) for part in parts]

    def _result(self, part: StepPart) -> PartResult:
        sequence = part.sequence
        assert sequence.num_computed + part.num_tokens <= len(sequence.tokens) + len(part.draft)
        assert len(sequence.block_table) * 4 >= sequence.num_computed + part.num_tokens
        if not part.samples:
            return PartResult()
        text = self.texts[sequence.id][sequence.num_output_tokens :]
        right = 0
        while right < len(part.draft) and text[right] == part.draft[right]:
            right += 1
        return PartResult(text[0], more=tuple(text[1 : right + 1]))


def run(planner: StepPlanner, model: Model, speculation: Speculation | None) -> None:
    while planner.sequences:
        parts = planner.plan(0.0)
        assert sum(part.num_tokens for part in parts) <= planner.step_tokens
        results = model.step(parts)
        if speculation:
            speculation.observe(parts, results, 1.0)
        planner.apply(parts, results)
        planner.check_integrity()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**9), num=st.integers(1, 5), drafts=st.integers(1, 6), step_tokens=st.integers(5, 40),
    blocks=st.integers(24, 60), batch=st.integers(1, 5),
)  # fmt: skip
def test_drafts_change_no_text_and_break_no_bound(
    seed: int, num: int, drafts: int, step_tokens: int, blocks: int, batch: int
) -> None:
    rng = random.Random(seed)
    texts, sequences = {}, []
    for i in range(num):
        length = rng.randint(1, 40)
        texts[str(i)] = [rng.choice([2, 3, 4]) if rng.random() > 0.02 else EOS for _ in range(length)] + [5] * 10
        sequences.append(make_sequence([rng.choice([2, 3, 4]) for _ in range(rng.randint(1, 30))], length, str(i)))
    speculation = Speculation(drafts)
    planner = StepPlanner(
        "continuous", batch, step_tokens, BlockAllocator(blocks, 4), 1000, lambda: 0.0,
        eos_token_ids=frozenset({EOS}), drafter=speculation,
    )  # fmt: skip
    for sequence in sequences:
        planner.add(sequence)
    run(planner, Model(texts), speculation)
    for sequence in sequences:
        output = sequence.tokens[sequence.num_prompt_tokens :]
        expected = texts[sequence.id][: sequence.max_tokens]
        assert output == expected[: expected.index(EOS) + 1 if EOS in expected else None]
    assert planner.allocator.used == 0


def test_a_repeating_text_takes_fewer_steps() -> None:
    texts = {"a": [2, 3, 4] * 40}
    counts = []
    for speculation in (None, Speculation(4)):
        planner = StepPlanner(
            "continuous", 1, 64, BlockAllocator(64, 4), 1000, lambda: 0.0, drafter=speculation
        )  # fmt: skip
        planner.add(make_sequence([2, 3, 4, 2, 3, 4], 100))
        model = Model(texts)
        run(planner, model, speculation)
        counts.append(model.num_steps)
    assert counts[0] == 100
    assert counts[1] < 50


def test_no_drafts_where_a_token_changes_the_chances_of_the_next() -> None:
    speculation = Speculation(4)
    repeating = [2, 3, 4] * 5
    assert speculation.limit(make_sequence(repeating, 9)) == 4
    assert speculation.propose([Ask(make_sequence(repeating, 9), 4)]) == [(2, 3, 4, 2)]
    for params in (SamplingParams(presence_penalty=1.0), SamplingParams(repetition_penalty=1.1)):
        assert speculation.limit(make_sequence(repeating, 9, sampling=params)) == 0


def step_of(speculation: Speculation, batch_size: int, *, right: int, draft_s: float) -> None:
    """A decode step of sequences whose drafts (of 4) are `right` so far; each draft token costs `draft_s`."""
    draft = (2, 3, 4, 2) if speculation.is_on else ()
    parts = [StepPart(make_sequence([2], 9), 1 + len(draft), samples=True, draft=draft) for _ in range(batch_size)]
    results = [PartResult(2, more=draft[:right]) for _ in parts]
    speculation.observe(parts, results, 1.0 + draft_s * len(draft) * batch_size)


def share_on(speculation: Speculation, batch_size: int, steps: int, **step: float) -> float:
    on = 0
    for _ in range(steps):
        step_of(speculation, batch_size, **step)  # type: ignore[arg-type]
        on += speculation.is_on
    return on / steps


def test_drafts_end_where_they_do_not_pay_and_come_back_when_they_do() -> None:
    speculation = Speculation(4)
    share_on(speculation, 8, 50, right=0, draft_s=0.05)
    assert share_on(speculation, 8, 2000, right=0, draft_s=0.05) < 0.05
    share_on(speculation, 8, 1000, right=3, draft_s=0.01)
    assert share_on(speculation, 8, 1000, right=3, draft_s=0.01) > 0.9


def test_what_pays_is_learned_for_each_size_of_batch() -> None:
    speculation = Speculation(4)
    for _ in range(4):
        share_on(speculation, 1, 50, right=2, draft_s=0.05)
        share_on(speculation, 16, 50, right=2, draft_s=0.05)
    assert share_on(speculation, 1, 200, right=2, draft_s=0.05) > 0.9
    assert share_on(speculation, 16, 200, right=2, draft_s=0.05) < 0.2


def test_it_counts_what_was_guessed_and_what_was_right() -> None:
    speculation = Speculation(4)
    step_of(speculation, 2, right=3, draft_s=0.0)
    assert (speculation.num_drafted, speculation.num_accepted) == (8, 6)


class Reader:
    """A source that has read a text after so many asks, and is wrong then."""

    memory_bytes = 0

    def __init__(self, num_behind: int) -> None:
        self._num_left = num_behind
        self.is_level = False

    def propose(self, asks: Sequence_[Ask]) -> list[tuple[int, ...]]:
        self._num_left -= 1
        self.is_level = self._num_left < 0
        return [(9,) * limit if self.is_level else () for _, limit in asks]


@pytest.mark.parametrize(("num_behind", "steps_on"), [(0, 8), (10, 18), (1000, 39)])
def test_a_source_is_judged_when_it_has_read_what_it_missed_or_takes_too_long(num_behind: int, steps_on: int) -> None:
    speculation = Speculation(4, Reader(num_behind))
    on = 0
    while speculation.is_on:
        sequence = make_sequence([2], 9)
        (draft,) = speculation.propose([Ask(sequence, 4)])
        part = StepPart(sequence, 1 + len(draft), samples=True, draft=draft)
        speculation.observe([part], [PartResult(2)], 1.0)
        on += 1
    assert on == steps_on
