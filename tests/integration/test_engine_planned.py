"""Planner and runner together: blocks shared, swapped and given up, and every request has the tokens it has alone."""

import random
from pathlib import Path

import pytest

from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import Sequence
from scheduling.core.swap import SwapSpace
from tests.checkpoints import VOCAB, make_checkpoint
from tests.integration.test_engine_parity import generate_alone, gpu, make_sequence

NUM_BLOCKS = 13
NUM_HOST_BLOCKS = 30


class Case:
    """A runner and prompts, many of which begin alike, with what the model makes of each alone."""

    def __init__(self, path: Path, device: str) -> None:
        model = make_checkpoint("llama", path)
        rng = random.Random(3)
        common = [rng.randrange(3, VOCAB) for _ in range(70)]
        spec = DeploymentSpec(name="m", path=str(path), dtype="float32")
        self.runner = ModelRunner(spec, device, num_blocks=NUM_BLOCKS, num_host_blocks=NUM_HOST_BLOCKS)
        self.prompts = []
        for shared in (70, 70, 40, 64, 0, 33, 70, 0, 16, 70):
            own = [rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 7, 20]))]
            self.prompts.append((common[:shared] + own, rng.choice([5, 30, 40])))
        self.expected = [generate_alone(model, prompt, num) for prompt, num in self.prompts]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=gpu)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("shared"), request.param)


def serve(case: Case, *, reuse: bool, swaps: bool) -> tuple[StepPlanner, list[Sequence], int]:
    """Run all prompts, with an urgent one now and then; also how many tokens were computed."""
    runner = case.runner
    allocator = BlockAllocator(runner.num_blocks, runner.block_size)
    planner = StepPlanner(
        "continuous",
        4,
        48,
        allocator,
        runner.max_model_len,
        lambda: 0.0,
        prefix=PrefixCache(allocator, key=b"key") if reuse else None,
        swap=SwapSpace(NUM_HOST_BLOCKS, runner.block_size, pays=lambda num_tokens: True) if swaps else None,
        long_prefill_threshold=20,
    )
    sequences = [make_sequence(str(i), prompt, num) for i, (prompt, num) in enumerate(case.prompts)]
    waiting, num_computed = list(sequences), 0
    for step in range(2000):
        if waiting and step % 3 == 0:
            sequence = waiting.pop(0)
            if len(waiting) % 3 == 0 and planner.urgent_room() is not None:
                sequence.priority, sequence.is_urgent = 0, True
            planner.add(sequence)
        if not planner.sequences and not waiting:
            return planner, sequences, num_computed
        parts = planner.plan(0.0)
        for direction, pairs in planner.take_moves():
            (runner.swap_out if direction == "out" else runner.swap_in)(pairs)
        num_computed += sum(part.num_tokens for part in parts)
        planner.apply(parts, runner.step(parts))
        planner.check_integrity()
    raise AssertionError("not in time")


@pytest.mark.parametrize(("reuse", "swaps"), [(True, False), (False, True), (True, True), (False, False)])
def test_every_request_has_the_tokens_it_has_alone(case: Case, reuse: bool, swaps: bool) -> None:
    planner, sequences, _ = serve(case, reuse=reuse, swaps=swaps)
    assert [sequence.tokens for sequence in sequences] == case.expected
    assert planner.num_preemptions > 0
    assert planner.num_slot_preemptions > 0
    if planner.swap:
        assert planner.swap.num_out >= planner.swap.num_in > 0
    if planner.prefix:
        assert planner.prefix.num_hit_tokens > 100


def test_swapping_alone_computes_no_token_twice(case: Case) -> None:
    _, sequences, num_computed = serve(case, reuse=False, swaps=True)
    assert num_computed == sum(len(sequence.tokens) - 1 for sequence in sequences)
    _, _, again = serve(case, reuse=False, swaps=False)
    assert again > num_computed
