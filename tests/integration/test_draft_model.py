"""A draft model changes no token, is believed where it thinks alike, and has its memory counted."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
import transformers

from inference.engine.draft import DraftModel, load_draft
from inference.engine.errors import ModelLoadError
from inference.engine.runner import ModelRunner
from inference.messages import BatchEvent, DeploymentSpec
from scheduling.core.sequence import SamplingParams, Sequence
from scheduling.core.speculation import Ask, Speculation
from scheduling.keys import Keys
from tests.checkpoints import VOCAB, make_checkpoint, make_tokenizer
from tests.integration.engines import Engines, make_tiny_checkpoint
from tests.integration.fleet import FleetClient
from tests.integration.test_engine_parity import GREEDY, generate_alone, gpu, make_sequence
from tests.integration.test_engine_steps import Case

OPTIONS: list[dict[str, Any]] = [
    {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.3}, {"presence_penalty": 1.0},
    {"logit_bias": ((7, 9.0), (8, 9.0))}, {"min_tokens": 9, "logprobs": 2},
]  # fmt: skip
SAMPLED = [SamplingParams(seed=i, ignore_eos=True, **one) for i, one in enumerate(OPTIONS)]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=gpu)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("target"), request.param)


def load(case: Case, folder: Path) -> DraftModel:
    spec = DeploymentSpec(name="m", path="", dtype="float32", speculation="model", draft_path=str(folder))
    draft = load_draft(spec, case.runner)
    assert draft is not None
    return draft


def write_noisy(path: Path, noise: float) -> Path:
    """The target's own checkpoint with noise on its weights."""
    model = make_checkpoint("llama", path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    model.save_pretrained(path)
    return path


class Unhurried(Speculation):
    """Thinks that every step takes a second, drafts or none, so that its gate stays open while guesses are right."""

    def observe(self, parts: Any, results: Any, seconds: float) -> None:
        super().observe(parts, results, 1.0)


def make_sequences(case: Case, params: list[SamplingParams]) -> list[Sequence]:
    return [make_sequence(str(i), p, n, one) for i, ((p, n), one) in enumerate(zip(case.prompts, params, strict=True))]


@pytest.mark.parametrize("params", [[GREEDY] * 8, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_that_is_the_model_itself_is_right_every_time(
    case: Case, params: list[SamplingParams], tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path)
    plain, guessed = make_sequences(case, params), make_sequences(case, params)
    case.serve(plain, None)
    speculation = Unhurried(3, load(case, tmp_path))
    planner = case.serve(guessed, speculation)
    assert [sequence.tokens for sequence in guessed] == [sequence.tokens for sequence in plain]
    assert planner.num_preemptions > 0
    assert speculation.num_accepted == speculation.num_drafted > 80


@pytest.mark.parametrize("params", [[GREEDY] * 8, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_that_errs_changes_no_token(case: Case, params: list[SamplingParams], tmp_path: Path) -> None:
    plain, guessed = make_sequences(case, params), make_sequences(case, params)
    case.serve(plain, None)
    speculation = Unhurried(4, load(case, write_noisy(tmp_path, 0.01)))
    case.serve(guessed, speculation)
    assert [sequence.tokens for sequence in guessed] == [sequence.tokens for sequence in plain]
    if params[0] is GREEDY:
        assert [sequence.tokens for sequence in guessed] == case.expected
    assert 10 < speculation.num_accepted < speculation.num_drafted


def test_long_texts_are_read_a_part_at_a_time_and_those_that_are_level_are_guessed_for_meanwhile(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.engine.draft.READ_TOKENS", 16)
    make_checkpoint("llama", tmp_path)
    draft, rng = load(case, tmp_path), random.Random(1)
    sequences = [make_sequence(str(i), [rng.randrange(3, VOCAB) for _ in range(n)], 9) for i, n in enumerate((40, 2))]
    for i, sequence in enumerate(sequences):
        sequence.block_table = list(range(4 * i, 4 * i + 4))
    asks = [Ask(sequence, 2) for sequence in sequences]
    lengths, level = [], []
    for _ in range(4):
        lengths.append([len(draft) for draft in draft.propose(asks)])
        level.append(draft.is_level)
    assert lengths == [[0, 2], [0, 2], [2, 2], [2, 2]]
    assert level == [False, False, True, True]


def test_after_wrong_guesses_it_guesses_what_a_model_does_that_reads_the_text_anew(case: Case, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    follows, reads = load(case, tmp_path), load(case, tmp_path)
    text = make_sequence("a", [9, 8, 7], 99)
    text.block_table = [4, 2, 7, 5]
    rng = random.Random(2)
    for num_right, num_more in ((0, 1), (3, 1), (1, 6), (4, 1), (2, 1), (0, 9), (1, 1)):  # it is off now and then
        guesses = follows.propose([Ask(text, 4)])[0]
        assert guesses == reads.propose([Ask(replace(text, lookup=None), 4)])[0]
        text.tokens += [*guesses[:num_right], *(rng.randrange(3, VOCAB) for _ in range(num_more))]


def test_a_sequence_beyond_the_draft_model_s_context_has_no_guesses(case: Case, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, max_position_embeddings=20)
    draft = load(case, tmp_path)
    sequence = make_sequence("a", [5] * 17, 9)
    sequence.block_table = [0, 1]
    assert len(draft.propose([Ask(sequence, 3)])[0]) == 3
    sequence.tokens.append(7)
    assert draft.propose([Ask(sequence, 3)]) == [()]


def test_a_draft_model_that_fails_ends_guessing_and_nothing_else(case: Case, tmp_path: Path) -> None:
    write_noisy(tmp_path, float("nan"))
    with pytest.raises(ModelLoadError):
        load(case, tmp_path)
    make_checkpoint("llama", tmp_path / "sane")
    draft = load(case, tmp_path / "sane")
    sequence = make_sequence("a", [5, VOCAB + 9], 9)
    sequence.block_table = [0]
    assert draft.propose([Ask(sequence, 3)]) == [()]
    assert draft.propose([Ask(sequence, 3)]) == [()]


def test_another_vocabulary_is_refused_with_a_sentence(case: Case, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, vocab_size=VOCAB + 8)
    with pytest.raises(ModelLoadError, match=f"a vocabulary of {VOCAB + 8} tokens"):
        load(case, tmp_path)


def test_both_caches_fit_the_memory_that_was_asked_for(tmp_path: Path) -> None:
    for name in ("large", "small"):
        make_checkpoint("llama", tmp_path / name, **({"num_hidden_layers": 1} if name == "small" else {}))
    spec = DeploymentSpec(
        name="m", path=str(tmp_path / "large"), kv_memory_bytes=2**20, speculation="model",
        draft_path=str(tmp_path / "small"),
    )  # fmt: skip
    runner = ModelRunner(spec, "cpu")
    draft = load_draft(spec, runner)
    assert draft is not None
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").num_parameters() * 4
    caches = runner.num_blocks * runner.block_bytes + draft.memory_bytes - weights
    assert 2**20 - runner.block_bytes * 2 < caches <= 2**20


@pytest.fixture
def engines(tmp_path: Path, redis_url: str, keys: Keys) -> Iterator[Engines]:
    with Engines(make_tiny_checkpoint(tmp_path / "target"), redis_url, keys) as engines:
        yield engines


def test_an_engine_with_a_draft_model_gives_the_tokens_of_generate_and_counts_its_guesses(
    engines: Engines, store: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    fleet = FleetClient(store, keys, Engines.model)
    make_tokenizer("bytes", write_noisy(tmp_path / "draft", 0.005))
    engines.start(speculation="model", draft_path=str(tmp_path / "draft"))
    prompts = [[5 + i, 6, 7] for i in range(3)]
    for i, prompt in enumerate(prompts):
        fleet.submit(str(i), prompt, 120)
    fleet.until_finished()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    for i, prompt in enumerate(prompts):
        assert [*prompt, *fleet.answers[str(i)].token_ids] == generate_alone(model, prompt, 120)
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.output_tokens == 360)
    status = fleet.status("gpu-0")
    assert status is not None
    assert "Guesses come from LlamaForCausalLM" in status.detail
    assert 0 < status.accepted_tokens <= status.draft_tokens
    fleet.until(lambda: sum(event.accepted_tokens for event in fleet.events(BatchEvent)) == status.accepted_tokens)
