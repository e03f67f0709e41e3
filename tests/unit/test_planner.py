"""The step planner: blocks conserved, budget kept, every token computed once, everybody finishes."""

import time
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.blocks import BlockAllocator
from scheduling.core.forming import DYNAMIC_WAIT_S, Mode
from scheduling.core.planner import RequestTooLongError, StepPlanner
from scheduling.core.sequence import PartResult, SamplingParams, Sequence, StepPart

EOS = 1
modes = st.sampled_from(get_args(Mode))


def make_sequence(name: str, prompt: int = 4, output: int = 4, priority: int = 3, arrival_s: float = 0.0) -> Sequence:
    return Sequence(
        id=name,
        attempt=1,
        tenant="t",
        priority=priority,
        arrival_s=arrival_s,
        tokens=[7] * prompt,
        num_prompt_tokens=prompt,
        max_tokens=output,
        sampling=SamplingParams(),
    )


def make_planner(
    mode: Mode = "continuous", batch: int = 4, step_tokens: int = 64, blocks: int = 64, block_size: int = 4
) -> StepPlanner:
    allocator = BlockAllocator(blocks, block_size)
    return StepPlanner(mode, batch, step_tokens, allocator, 10_000, lambda: 0.0, eos_token_ids=frozenset({EOS}))


def results_of(parts: list[StepPart], token_id: int = 5) -> list[PartResult]:
    return [PartResult(token_id if part.samples else None) for part in parts]


def ids(parts: list[StepPart]) -> list[str]:
    return [part.sequence.id for part in parts]


class Watcher:
    """Runs a planner with a fake forward pass and notes which token positions were computed."""

    def __init__(self, planner: StepPlanner) -> None:
        self.planner = planner
        self.computed: dict[str, Counter[int]] = {}
        self.preempted: set[str] = set()
        self.finished: dict[str, str] = {}
        self.now = 0.0

    def step(self, token_id: int = 5) -> int:
        before = {s.id: s.num_computed for s in self.planner.sequences}
        parts = self.planner.plan(self.now)
        for sequence in self.planner.sequences:
            if sequence.num_computed < before[sequence.id]:
                self.computed.pop(sequence.id, None)
                self.preempted.add(sequence.id)
        assert sum(part.num_tokens for part in parts) <= self.planner.step_tokens
        assert len({part.sequence.id for part in parts}) == len(parts) <= max(1, self.planner.num_running)
        for part in parts:
            self._note(part)
        for output in self.planner.apply(parts, results_of(parts, token_id)):
            if output.finish:
                self.finished[output.sequence.id] = output.finish
        self.planner.check_integrity()
        self.now += 0.02
        return len(parts)

    def _note(self, part: StepPart) -> None:
        sequence = part.sequence
        end = sequence.num_computed + part.num_tokens
        assert part.num_tokens >= 1
        assert part.samples == (end == len(sequence.tokens))
        assert len(sequence.block_table) * self.planner.allocator.block_size >= end
        self.computed.setdefault(sequence.id, Counter()).update(range(sequence.num_computed, end))


shapes = st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 5), st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(
    mode=modes,
    batch=st.integers(1, 6),
    step_tokens=st.integers(1, 40),
    blocks=st.integers(16, 40),
    arrivals=st.lists(st.tuples(st.integers(0, 5), shapes), min_size=1, max_size=12),
)
def test_every_token_is_computed_once_in_budget_and_everybody_finishes(
    mode: Mode,
    batch: int,
    step_tokens: int,
    blocks: int,
    arrivals: list[tuple[int, tuple[int, int, int, int]]],
) -> None:
    watcher = Watcher(make_planner(mode, batch, step_tokens, blocks))
    arrivals = sorted(arrivals, key=lambda a: a[0])
    sequences = [make_sequence(str(i), p, o, pr, float(at)) for i, (_, (p, o, pr, at)) in enumerate(arrivals)]
    for step in range(6000):
        for (at, _), sequence in zip(arrivals, sequences, strict=True):
            if at == step:
                watcher.planner.add(sequence)
        watcher.step()
        if len(watcher.finished) == len(sequences):
            break
    assert watcher.finished == {s.id: "length" for s in sequences}
    assert watcher.planner.allocator.used == 0
    for sequence in sequences:
        assert sequence.num_output_tokens == sequence.max_tokens
        assert watcher.computed[sequence.id] == Counter(range(len(sequence.tokens) - 1))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_blocks_are_conserved_under_any_order_of_calls(data: st.DataObject) -> None:
    planner = make_planner(data.draw(modes), batch=4, step_tokens=12, blocks=16)
    watcher = Watcher(planner)
    for number in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["add", "step", "eos", "remove", "shrink", "postpone", "mode", "size"])):
            case "add":
                prompt, output, priority, arrival_s = data.draw(shapes)
                planner.add(make_sequence(str(number), prompt, output, priority, arrival_s))
            case "step":
                watcher.step()
            case "eos":
                watcher.step(EOS)
            case "remove" if planner.sequences:
                planner.remove(data.draw(st.sampled_from(planner.sequences)))
            case "shrink":
                planner.shrink()
            case "postpone":
                if planner.num_running:
                    planner.postpone(data.draw(st.sampled_from(planner.sequences[: planner.num_running])))
            case "mode":
                planner.set_mode(data.draw(modes))
            case "size":
                planner.set_batch_size(data.draw(st.integers(1, 8)))
        planner.check_integrity()
    held = planner.clear()
    assert not planner.sequences
    assert planner.allocator.used == 0
    assert all(not sequence.block_table for sequence in held)


def test_decodes_come_before_prefill_chunks_and_share_the_budget() -> None:
    planner = make_planner(step_tokens=6)
    planner.add(make_sequence("a", prompt=3))
    planner.apply(parts := planner.plan(0.0), results_of(parts))
    planner.add(make_sequence("b", prompt=9))
    parts = planner.plan(0.0)
    assert [(p.sequence.id, p.num_tokens, p.samples) for p in parts] == [("a", 1, True), ("b", 5, False)]
    planner.apply(parts, results_of(parts))
    parts = planner.plan(0.0)
    assert [(p.sequence.id, p.num_tokens, p.samples) for p in parts] == [("a", 1, True), ("b", 4, True)]


def test_a_sequence_joins_a_running_batch_only_when_continuous() -> None:
    for mode, expected in [("serial", ["a"]), ("static", ["a"]), ("dynamic", ["a"]), ("continuous", ["a", "b"])]:
        planner = make_planner(mode)  # type: ignore[arg-type]
        planner.add(make_sequence("a"))
        planner.apply(parts := planner.plan(1.0), results_of(parts))
        planner.add(make_sequence("b"))
        assert ids(planner.plan(2.0)) == expected, mode


def test_a_dynamic_batch_starts_when_full_or_after_its_wait() -> None:
    planner = make_planner("dynamic", batch=2)
    planner.add(make_sequence("a"))
    assert planner.plan(DYNAMIC_WAIT_S - 0.01) == []
    assert planner.due_s(DYNAMIC_WAIT_S - 0.01) == pytest.approx(0.01)
    assert ids(planner.plan(DYNAMIC_WAIT_S)) == ["a"]

    planner = make_planner("dynamic", batch=2)
    planner.add(make_sequence("a"))
    planner.add(make_sequence("b"))
    assert ids(planner.plan(0.0)) == ["a", "b"]


def test_the_sequence_of_least_right_is_preempted_and_keeps_its_place() -> None:
    planner = make_planner(batch=3, blocks=4)
    low = make_sequence("low", prompt=7, output=8, priority=5)
    high = make_sequence("high", prompt=8, output=8, priority=0)
    planner.add(low)
    planner.apply(parts := planner.plan(0.0), results_of(parts))
    planner.add(high)
    planner.allocator.free([planner.allocator.allocate(1)[0]])
    planner._roster.watermark_blocks = 0
    planner.apply(parts := planner.plan(0.0), results_of(parts))
    assert ids(parts) == ["low", "high"]
    planner.add(make_sequence("later", prompt=4, output=4, priority=0))
    parts = planner.plan(0.0)
    assert ids(parts) == ["high"]
    assert planner.num_preemptions == 1
    assert (low.num_computed, low.block_table) == (0, [])
    assert [s.id for s in planner.sequences] == ["high", "low", "later"]


def test_a_request_longer_than_cache_or_context_is_refused_alone() -> None:
    planner = make_planner(blocks=4)
    planner.add(make_sequence("fits", prompt=8, output=8))
    with pytest.raises(RequestTooLongError, match="together at most 16"):
        planner.add(make_sequence("long", prompt=9, output=8))
    assert [s.id for s in planner.sequences] == ["fits"]


def test_end_of_sequence_ends_a_request_unless_ignored() -> None:
    planner = make_planner()
    stops, goes_on = make_sequence("stops"), make_sequence("goes on")
    goes_on.sampling = SamplingParams(ignore_eos=True)
    planner.add(stops)
    planner.add(goes_on)
    outputs = planner.apply(parts := planner.plan(0.0), results_of(parts, EOS))
    assert [(o.sequence.id, o.finish) for o in outputs] == [("stops", "stop"), ("goes on", None)]


def test_a_part_that_failed_ends_its_sequence_alone() -> None:
    planner = make_planner()
    planner.add(make_sequence("good"))
    planner.add(make_sequence("bad"))
    outputs = planner.apply(planner.plan(0.0), [PartResult(5), PartResult(error="no")])
    assert [(o.sequence.id, o.token_id, o.error) for o in outputs] == [("good", 5, None), ("bad", None, "no")]
    assert [s.id for s in planner.sequences] == ["good"]


def test_room_counts_slots_and_blocks_that_nobody_will_need() -> None:
    planner = make_planner(batch=3, blocks=10)
    assert planner.room() == (3, 40)
    planner.add(make_sequence("a", prompt=5))
    assert planner.room() == (2, (10 - 1 - 2) * 4)
    planner.plan(0.0)
    assert planner.room() == (2, (10 - 1 - 2) * 4)
    planner.set_batch_size(1)
    assert planner.room() == (0, 0)


def test_a_sequence_that_gives_its_last_token_next_makes_room_already() -> None:
    planner = make_planner(batch=2, blocks=10)
    planner.add(make_sequence("short", prompt=5, output=2))
    planner.add(make_sequence("long", prompt=5, output=9))
    assert planner.room() == (0, 0)
    planner.apply(parts := planner.plan(0.0), results_of(parts))
    assert planner.room() == (1, (10 - 4 + 2 - 1) * 4)
    planner.add(make_sequence("next", prompt=5, output=9))
    assert planner.room() == (0, 0)
    planner.apply(parts := planner.plan(0.0), results_of(parts))
    assert ids(planner.plan(0.0)) == ["long", "next"]


def test_out_of_memory_preempts_and_halves_the_budget_until_nothing_is_left_to_shrink() -> None:
    planner = make_planner(step_tokens=64)
    planner.add(make_sequence("a", prompt=60))
    planner.add(make_sequence("b", prompt=4))
    planner.plan(0.0)
    assert planner.shrink()
    assert ids(planner.plan(0.0)) == ["a"]
    assert planner.shrink()
    assert [p.num_tokens for p in planner.plan(0.0)] == [16]
    assert not planner.shrink()


def test_a_sequence_that_is_postponed_waits_behind_all_others_and_begins_anew() -> None:
    planner = make_planner(step_tokens=64, batch=3)
    for name in ("a", "b", "c"):
        planner.add(make_sequence(name, prompt=30))
    planner.apply(parts := planner.plan(0.0), results_of(parts))
    planner.postpone(planner.sequences[0])
    assert ids(planner.plan(0.0)) == ["b", "c", "a"]
    assert [s.id for s in planner.sequences] == ["b", "c", "a"]
    planner.shrink()
    assert [s.id for s in planner.sequences] == ["b", "c", "a"]
    assert planner.num_running == 2
    planner.check_integrity()


def test_the_budget_grows_back_after_a_shortage_of_memory_and_then_others_join() -> None:
    planner = make_planner(step_tokens=64)
    planner.add(make_sequence("a", prompt=4, output=100))
    planner.add(make_sequence("b", prompt=4, output=100))
    planner.plan(0.0)
    planner.shrink()
    steps = 0
    while planner.num_waiting:
        planner.apply(parts := planner.plan(0.0), results_of(parts))
        steps += 1
    assert 2 < steps < 20


def test_planning_sixteen_sequences_costs_a_fraction_of_a_step() -> None:
    planner = make_planner(batch=16, step_tokens=2048, blocks=4096, block_size=16)
    for i in range(16):
        planner.add(make_sequence(str(i), prompt=100, output=2000))
    started = time.thread_time()
    for _ in range(1000):
        parts = planner.plan(0.0)
        planner.apply(parts, results_of(parts))
    assert (time.thread_time() - started) / 1000 < 0.001
