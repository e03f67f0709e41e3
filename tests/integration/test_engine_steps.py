"""What fails in one request's part of a step fails that request alone; drafts change no request's tokens."""

import random
import sys
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import pytest

from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from inference.worker.process import EngineProcess
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import PartResult, SamplingParams, Sequence, StepPart
from scheduling.core.speculation import Ask, Drafter
from tests.checkpoints import VOCAB, make_checkpoint
from tests.integration.engines import Engines
from tests.integration.fleet import FleetClient
from tests.integration.poisoned_steps import FORWARD_POISON, NAN_POISON, TEXT_POISON
from tests.integration.test_engine_parity import GREEDY, generate_alone, gpu, make_sequence

COMMAND = [sys.executable, "-m", "tests.integration.poisoned_steps"]
INNOCENT = [[5 + i, 6, 7] for i in range(6)]
BIASED = SamplingParams(temperature=0.0, ignore_eos=True, logit_bias=((TEXT_POISON, 100.0),))
OUTSIDE = SamplingParams(temperature=0.0, ignore_eos=True, logit_bias=((10**6, 1.0),))


def test_poisoned_requests_fail_alone_in_one_step_after_another(engines: Engines, fleet: FleetClient) -> None:
    poisoned = {
        "forward": ([FORWARD_POISON, 6], GREEDY, "The forward pass failed (RuntimeError)."),
        "outside": ([5, 6], OUTSIDE, "outside the vocabulary of 320."),
        "text": ([5, 6], BIASED, "The text could not be made (ValueError)."),
        "nan": ([5, NAN_POISON], GREEDY, "The model's logits are not finite; this request cannot go on."),
    }
    for i, prompt in enumerate(INNOCENT):
        fleet.submit(f"before-{i}", prompt, 30)
    process: EngineProcess = engines.start(command=COMMAND)
    fleet.until_finished()
    for i, prompt in enumerate(INNOCENT):
        fleet.submit(f"beside-{i}", prompt, 30)
        if i < len(poisoned):
            name = list(poisoned)[i]
            fleet.submit(name, poisoned[name][0], 30, sampling=poisoned[name][1])
    fleet.until_finished()
    for name, (_, _, sentence) in poisoned.items():
        finish = fleet.answers[name].finish
        assert finish is not None
        code = "bad_request" if name == "outside" else "engine_error"
        assert (finish.reason, finish.error_code) == ("error", code)
        assert finish.error_message.endswith(sentence)
    for i in range(len(INNOCENT)):
        assert fleet.answers[f"beside-{i}"].token_ids == fleet.answers[f"before-{i}"].token_ids
    assert process.wait(0) is None


def test_an_engine_that_guesses_gives_the_tokens_of_one_that_does_not(engines: Engines, fleet: FleetClient) -> None:
    repeating = SamplingParams(temperature=0.8, seed=3, ignore_eos=True, logit_bias=((7, 30.0), (8, 30.0)))
    params = [repeating, SamplingParams(temperature=0.8, seed=4, ignore_eos=True), *[GREEDY] * 4]
    for replica, speculation in (("plain", "off"), ("guessing", "ngram")):
        engine = engines.start(replica, speculation=speculation, num_draft_tokens=5)
        for i, prompt in enumerate(INNOCENT):
            fleet.submit(f"{replica}-{i}", prompt, 150, sampling=params[i])
        fleet.until_finished()
        if replica == "plain":
            engine.kill()
    fleet.until(lambda: (s := fleet.status("guessing")) is not None and s.output_tokens == 6 * 150)
    for i in range(len(INNOCENT)):
        assert fleet.answers[f"guessing-{i}"].token_ids == fleet.answers[f"plain-{i}"].token_ids
    status = fleet.status("guessing")
    assert status is not None
    assert 0 < status.accepted_tokens <= status.draft_tokens


class Oracle:
    """Knows what comes next, and errs now and then."""

    def __init__(self, texts: dict[str, list[int]]) -> None:
        self._texts = texts
        self._random = random.Random(4)
        self.num_drafted = self.num_accepted = 0
        self.spent_s = 0.0

    def limit(self, sequence: Sequence) -> int:
        return 0 if sequence.sampling.penalises else self._random.randint(0, 5)

    def propose(self, asks: Items[Ask]) -> list[tuple[int, ...]]:
        return [self._guess(sequence, limit) for sequence, limit in asks]

    def _guess(self, sequence: Sequence, limit: int) -> tuple[int, ...]:
        at = len(sequence.tokens)
        draft = self._texts[sequence.id][at : at + limit]
        return tuple(token if self._random.random() < 0.8 else self._random.randrange(3, VOCAB) for token in draft)

    def observe(self, parts: Items[StepPart], results: Items[PartResult], seconds: float) -> None:
        self.num_drafted += sum(len(part.draft) for part in parts)
        self.num_accepted += sum(len(result.more) for result in results)


class Case:
    """A runner and prompts with what the model makes of each alone."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        model = make_checkpoint("llama", path)
        rng = random.Random(3)
        self.runner = ModelRunner(DeploymentSpec(name="m", path=str(path), dtype="float32"), device, num_blocks=16)
        self.prompts = [
            ([rng.randrange(3, VOCAB) for _ in range(length)], rng.choice([20, 40]))
            for length in (1, 12, 30, 33, 60, 15, 16, 17)
        ]
        self.expected = [generate_alone(model, prompt, num) for prompt, num in self.prompts]

    def serve(self, sequences: list[Sequence], drafter: Drafter | None) -> StepPlanner:
        """Run sequences on few blocks, so that some are preempted."""
        allocator = BlockAllocator(self.runner.num_blocks, self.runner.block_size)
        planner = StepPlanner(
            "continuous", 6, 48, allocator, self.runner.max_model_len, lambda: 0.0, drafter=drafter,
            prefix=PrefixCache(allocator, key=b"key"),
        )  # fmt: skip
        for sequence in sequences:
            planner.add(sequence)
        while planner.sequences:
            parts = planner.plan(0.0)
            results = self.runner.step(parts)
            if drafter:
                drafter.observe(parts, results, 1.0)
            assert all(output.error is None for output in planner.apply(parts, results))
            planner.check_integrity()
        return planner


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=gpu)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("verified"), request.param)


def test_greedy_requests_with_drafts_get_the_tokens_of_generate(case: Case) -> None:
    sequences = [make_sequence(str(i), prompt, num) for i, (prompt, num) in enumerate(case.prompts)]
    oracle = Oracle({str(i): tokens for i, tokens in enumerate(case.expected)})
    planner = case.serve(sequences, oracle)
    assert [sequence.tokens for sequence in sequences] == case.expected
    assert planner.num_preemptions > 0
    assert 40 < oracle.num_accepted < oracle.num_drafted


def test_sampled_requests_with_drafts_get_the_tokens_they_get_without(case: Case) -> None:
    options: list[dict[str, Any]] = [
        {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.3}, {"presence_penalty": 1.0},
        {"logit_bias": ((7, 9.0), (8, 9.0))}, {"min_tokens": 9, "logprobs": 2},
    ]  # fmt: skip
    params = [SamplingParams(seed=i, ignore_eos=True, **one) for i, one in enumerate(options)]

    def make() -> list[Sequence]:
        prompts = zip(case.prompts, params, strict=True)
        return [make_sequence(str(i), prompt, num, one) for i, ((prompt, num), one) in enumerate(prompts)]

    plain, guessed = make(), make()
    case.serve(plain, None)
    oracle = Oracle({sequence.id: sequence.tokens for sequence in plain})
    case.serve(guessed, oracle)
    assert [sequence.tokens for sequence in guessed] == [sequence.tokens for sequence in plain]
    assert 40 < oracle.num_accepted < oracle.num_drafted
