"""Steps that are begun before their results are wanted, and laid out before their tokens are known, change no token."""

import random
from pathlib import Path

import pytest
import torch

from benchmarks.cuda import measure_steps
from benchmarks.roofline import MeteredRunner, Rates, Work
from inference.engine.attention import Rule
from inference.engine.batch import StepBatch
from inference.engine.graphs import GraphedForward
from inference.engine.kv_cache import BLOCK_SIZE
from inference.engine.loading import load_config, load_model
from inference.engine.modules import ModulesForward
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import SamplingParams, Sequence
from tests.checkpoints import SIZES, VOCAB, make_checkpoint
from tests.integration.test_engine_parity import GREEDY, generate_alone, gpu, make_sequence
from tests.integration.test_engine_sampler import DeviceSampler
from tests.integration.test_kv_cache import Cramped

NUM_BLOCKS = 12


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    rule: Rule,
) -> torch.Tensor:
    """In place of the Triton kernel: one sequence after the other."""
    found = []
    for q, whole, context in zip(query, tables, contexts.tolist(), strict=True):
        table = whole[: -(-context // BLOCK_SIZE)]  # behind it may stand anything
        k = keys[table].permute(1, 0, 3, 2).flatten(1, 2)[:, :context]
        v = values[table].transpose(0, 1).flatten(1, 2)[:, :context]
        group = q.unflatten(0, (len(k), -1))
        found.append((torch.softmax(group @ k.transpose(1, 2) * rule.scale, -1) @ v).flatten(0, 1))
    return torch.stack(found)


def as_on_cuda(runner: ModelRunner, path: Path) -> None:
    """Let a runner compute as one on a GPU does, but for graphs and the Triton kernel."""
    cpu = torch.device("cpu")
    model = load_model(path, load_config(path), torch.float32, cpu)
    modules = ModulesForward(None, model, runner._cache, cpu, "float32", attend)
    forward = GraphedForward(modules, model, runner._cache, attend, runner.max_model_len, as_graphs=False)
    with torch.inference_mode():
        forward.capture(4)
    runner._forward, runner._prepare, runner._extend = forward, forward.prepare, forward.extend
    runner._sampler.__class__ = DeviceSampler


class Case:
    """A runner that computes when a step is begun, as a GPU does, and prompts with what the model makes of each."""

    def __init__(self, path: Path, kind: str) -> None:
        model = make_checkpoint("llama", path)
        rng = random.Random(5)
        spec = DeploymentSpec(name="m", path=str(path), dtype="float32", max_batch_size=4)
        device = "cuda" if kind == "cuda" else "cpu"
        self.runner = ModelRunner(spec, device, num_blocks=NUM_BLOCKS, runs_ahead=True)
        if kind == "padded":
            as_on_cuda(self.runner, path)
        self.prompts = [
            ([rng.randrange(3, VOCAB) for _ in range(length)], rng.choice([20, 33, 50]))
            for length in (1, 12, 30, 33, 40, 15, 16, 17)
        ]
        self.expected = [generate_alone(model, prompt, num) for prompt, num in self.prompts]

    def sequences(self, params: list[SamplingParams]) -> list[Sequence]:
        pairs = zip(self.prompts, params, strict=True)
        return [make_sequence(str(i), prompt, num, one) for i, ((prompt, num), one) in enumerate(pairs)]

    def serve(self, sequences: list[Sequence], *, ends: dict[int, str]) -> StepPlanner:
        """The loop's order of things. `ends`: by number of the step, the sequence that is given up while it runs."""
        runner = self.runner
        allocator = BlockAllocator(runner.num_blocks, runner.block_size)
        planner = StepPlanner(
            "continuous", 4, 48, allocator, runner.max_model_len, lambda: 0.0, prefix=PrefixCache(allocator, key=b"key")
        )
        for sequence in sequences:
            planner.add(sequence)
        gone: set[str] = set()
        step = 0
        while planner.sequences:
            parts = planner.plan(0.0)
            wait = runner.start(parts)
            runner.foresee(planner.foresee(parts))
            planner.check_integrity()
            for sequence in sequences:
                if sequence.id == ends.get(step):
                    planner.remove(sequence)
                    del sequence.tokens[-1]  # as a stop string takes back what came after it
                    gone.add(sequence.id)
            kept = [pair for pair in zip(parts, wait(), strict=True) if pair[0].sequence.id not in gone]
            outputs = planner.apply([part for part, _ in kept], [result for _, result in kept])
            assert all(output.error is None for output in outputs)
            planner.check_integrity()
            step += 1
        return planner


@pytest.fixture(scope="module", params=["compiled", "padded", pytest.param("cuda", marks=gpu)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("ahead"), request.param)


def test_foreseen_steps_give_the_tokens_of_generate(case: Case) -> None:
    before, sequences = case.runner.num_foreseen, case.sequences([GREEDY] * 8)
    planner = case.serve(sequences, ends={})
    assert [sequence.tokens for sequence in sequences] == case.expected
    assert case.runner.num_foreseen - before > 30
    assert planner.num_preemptions > 0


def test_sampled_tokens_are_those_of_a_runner_that_does_not_run_ahead(case: Case) -> None:
    options = [{}, {"top_k": 3}, {"top_p": 0.5}, {"presence_penalty": 1.0}] * 2
    params = [SamplingParams(seed=i, ignore_eos=True, **one) for i, one in enumerate(options)]  # type: ignore[arg-type]
    ahead, plain = case.sequences(params), case.sequences(params)
    case.serve(ahead, ends={})
    case.runner.runs_ahead = False
    try:
        case.serve(plain, ends={})
    finally:
        case.runner.runs_ahead = True
    assert [sequence.tokens for sequence in ahead] == [sequence.tokens for sequence in plain]


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_a_request_that_ends_while_its_step_runs_harms_no_other(case: Case, runs_ahead: bool) -> None:
    sequences = case.sequences([GREEDY] * 8)
    case.runner.runs_ahead = runs_ahead
    try:
        case.serve(sequences, ends={7: "0", 12: "2", 13: "1", 30: "4"})
    finally:
        case.runner.runs_ahead = True
    for i in (3, 5, 6, 7):
        assert sequences[i].tokens == case.expected[i]
    assert len(sequences[0].tokens) < len(case.expected[0])


@pytest.mark.parametrize("case", ["padded", pytest.param("cuda", marks=gpu)], indirect=True)
def test_a_step_that_memory_lacked_to_send_ahead_is_sent_when_it_begins(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    foresee, cramped = case.runner.foresee, Cramped()

    def foresee_without_memory(sequences: list[Sequence]) -> None:
        with cramped:
            foresee(sequences)

    monkeypatch.setattr(case.runner, "foresee", foresee_without_memory)
    sequences = case.sequences([GREEDY] * 8)
    case.serve(sequences, ends={})
    assert cramped.num_refused
    assert [sequence.tokens for sequence in sequences] == case.expected


def test_an_error_of_a_step_that_was_begun_is_told_to_whoever_waits_for_it(case: Case) -> None:
    runner, forward = case.runner, case.runner._forward
    sequences = [make_sequence(str(i), [10 + i, 20, 30], 4) for i in range(4)]
    planner = StepPlanner("continuous", 4, 48, BlockAllocator(NUM_BLOCKS, 16), 200, lambda: 0.0)
    for sequence in sequences:
        planner.add(sequence)
    parts = planner.plan(0.0)
    expected = runner.step(parts)

    def fail(batch):  # type: ignore[no-untyped-def]
        if 12 in batch.token_ids:
            raise RuntimeError("a kernel refused this token")
        return forward(batch)

    runner._forward = fail
    try:
        wait = runner.start(parts)
    finally:
        results = wait()
        runner._forward = forward
    assert results[2].error == "The forward pass failed (RuntimeError)."
    assert results[:2] + results[3:] == expected[:2] + expected[3:]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_the_benchmark_of_decode_steps_measures_steps_that_were_foreseen(device: str, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    spec = DeploymentSpec(name="m", path=str(tmp_path), dtype="float32", max_batch_size=4)
    runner = ModelRunner(spec, device, num_blocks=NUM_BLOCKS, runs_ahead=True)
    if device == "cpu":
        as_on_cuda(runner, tmp_path)
    prepared = []
    prepare = runner._prepare
    assert prepare is not None

    def note(batch: StepBatch) -> None:
        prepared.append(batch)
        prepare(batch)

    runner._prepare = note
    metered = MeteredRunner(runner, Work.of(SIZES), Rates(1e12, 1e12))
    found = measure_steps(metered, 3, context=20, steps=5)
    assert found["foreseen"] == 5, "the warm-up foresaw the first one"
    assert len(prepared) == 8
    assert found["step_ms"] > found["least_ms"] > 0
    assert measure_steps(metered, 4, context=60) == {}, "there are no blocks for so many"
