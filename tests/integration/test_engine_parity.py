"""In any batch a request gets the tokens that the model alone would give it."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.sequence import SamplingParams, Sequence, StepPart
from tests.checkpoints import ARCHITECTURES, VOCAB, make_checkpoint

NUM_BLOCKS = 40
PATHS = {
    "fused": {"native": True, "fused": True},
    "modules": {"native": True, "fused": False},
    "torch": {"native": False, "fused": False},
}
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def make_sequence(name: str, prompt: list[int], max_tokens: int, sampling: SamplingParams = GREEDY) -> Sequence:
    return Sequence(
        id=name, attempt=1, tenant="t", priority=3, arrival_s=0.0, tokens=list(prompt), num_prompt_tokens=len(prompt),
        max_tokens=max_tokens, sampling=sampling,
    )  # fmt: skip


class Traffic:
    """Sequences that join, leave, compute chunks and lose their blocks at random steps, on scattered blocks."""

    def __init__(self, runner: ModelRunner, sequences: list[Sequence], seed: int) -> None:
        self.runner, self.random = runner, random.Random(seed)
        self.free = list(range(runner.num_blocks))
        self.random.shuffle(self.free)
        self.waiting, self.running = list(sequences), list[Sequence]()
        self.preemptions = self.mixed_steps = 0

    def run(self) -> None:
        while self.waiting or self.running:
            while self.waiting and (not self.running or self.random.random() < 0.4):
                self.running.append(self.waiting.pop(0))
            if len(self.running) > 1 and self.random.random() < 0.06:
                self.preempt(self.random.choice(self.running))
            self.step([part for s in self.running if (part := self.choose(s))])

    def choose(self, sequence: Sequence) -> StepPart | None:
        missing = len(sequence.tokens) - sequence.num_computed
        count = missing if missing == 1 else self.random.choice([1, 2, 15, 16, 17, 33, missing, missing])
        count = min(count, missing)
        needed = -(-(sequence.num_computed + count) // 16) - len(sequence.block_table)
        if needed > len(self.free) or self.random.random() < 0.1:
            return None
        for _ in range(needed):
            sequence.block_table.append(self.free.pop())
        return StepPart(sequence, count, samples=count == missing)

    def step(self, parts: list[StepPart]) -> None:
        if not parts:
            return self.preempt(self.running[-1]) if not self.free else None
        lengths = {min(part.num_tokens, 2) for part in parts}
        self.mixed_steps += len(lengths) == 2
        for part, result in zip(parts, self.runner.step(parts), strict=True):
            assert result.error is None
            part.sequence.num_computed += part.num_tokens
            if result.token_id is not None:
                part.sequence.tokens.append(result.token_id)
                if part.sequence.num_output_tokens == part.sequence.max_tokens:
                    self.running.remove(part.sequence)
                    self.release(part.sequence)
        return None

    def preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.release(sequence)
        sequence.num_computed = 0
        self.waiting.append(sequence)
        self.preemptions += 1

    def release(self, sequence: Sequence) -> None:
        self.free += sequence.block_table
        sequence.block_table.clear()


def generate_alone(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    tokens: list[int] = out[0].tolist()
    return tokens


def make_prompts(seed: int) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)
    lengths = [1, 15, 16, 17, 31, 33, 64, 90, 5, 48]
    return [([rng.randrange(3, VOCAB) for _ in range(n)], rng.choice([1, 4, 16, 17, 33, 40])) for n in lengths]


class Reference:
    """Checkpoints with what `generate` makes of the prompts, one by one; made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers: dict[str, list[list[int]]] = {}

    def path(self, architecture: str) -> Path:
        self.answers(architecture)
        return self.folder / architecture

    def answers(self, architecture: str) -> list[list[int]]:
        if architecture not in self._answers:
            model = make_checkpoint(architecture, self.folder / architecture)
            self._answers[architecture] = [generate_alone(model, prompt, n) for prompt, n in make_prompts(1)]
        return self._answers[architecture]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_request_of_a_mixed_batch_gets_the_tokens_it_would_get_alone(
    reference: Reference, architecture: str, path: str
) -> None:
    expected, folder = reference.answers(architecture), reference.path(architecture)
    runner = ModelRunner(DeploymentSpec(name="m", path=str(folder)), "cpu", num_blocks=NUM_BLOCKS, **PATHS[path])
    prompts = make_prompts(1)
    sequences = [make_sequence(str(i), prompt, n) for i, (prompt, n) in enumerate(prompts)]
    traffic = Traffic(runner, sequences, seed=5)
    traffic.run()
    assert traffic.preemptions > 0
    assert traffic.mixed_steps > 5
    assert [sequence.tokens for sequence in sequences] == expected


def test_a_sampled_request_gets_the_same_tokens_in_any_batch(reference: Reference) -> None:
    folder = reference.path("llama")
    runner = ModelRunner(DeploymentSpec(name="m", path=str(folder)), "cpu", num_blocks=NUM_BLOCKS)
    answers = []
    for seed in (1, 2, 3):
        ours = make_sequence("ours", [7, 8, 9, 10], 40, SamplingParams(temperature=0.9, top_p=0.8, seed=11))
        others = [
            make_sequence(f"{seed}-{i}", prompt, n, SamplingParams(temperature=1.3, seed=seed * 100 + i))
            for i, (prompt, n) in enumerate(make_prompts(seed))
        ]
        Traffic(runner, [*others[:seed], ours, *others[seed:]] if seed > 1 else [ours], seed=seed).run()
        answers.append(ours.tokens)
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0][4:])) > 5
