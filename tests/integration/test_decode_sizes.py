"""Decode steps filled up to sizes: which are made ready, what becomes of those that cannot be, and that tokens stay."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import torch
import transformers

from inference.engine import assembly, loading
from inference.engine.attention import split
from inference.engine.batch import StepBatch, build_batch
from inference.engine.errors import ModelLoadError
from inference.engine.graphs import SIZES, GraphedForward, sizes_for
from inference.engine.kv_cache import BLOCK_SIZE, KVCache
from inference.engine.modules import ModulesForward
from inference.messages import DeploymentSpec
from scheduling.core.sequence import StepPart
from scheduling.keys import Keys
from tests.checkpoints import VOCAB, make_checkpoint
from tests.integration.engines import Engines, make_tiny_checkpoint
from tests.integration.fleet import FleetClient
from tests.integration.test_engine_parity import generate_alone, make_sequence
from tests.integration.test_running_ahead import attend
from tests.patience import PATIENCE_S

CPU = torch.device("cpu")


class Limited:
    """In place of the Triton kernel: raises `error` in steps of more than `most` sequences while it is `strict`."""

    def __init__(self, most: int, error: type[Exception]) -> None:
        self.most, self.error, self.strict, self.num_refused = most, error, True, 0

    def __call__(self, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self.strict and len(query) > self.most:
            self.num_refused += 1
            raise self.error
        return attend(query, *rest)


def attend_wrongly_to_four(query: torch.Tensor, *rest: Any) -> torch.Tensor:
    return attend(query, *rest) + (len(query) == 4)


class Model:
    """A small model over a cache, and its own logits for the probe."""

    def __init__(self, path: Path) -> None:
        make_checkpoint("llama", path)
        config = loading.load_config(path)
        self.model = loading.load_model(path, config, torch.float32, CPU)
        self.expected = loading.reference_logits(self.model, VOCAB, assembly.PROBE_TOKENS, CPU)
        self.cache = KVCache(loading.kv_shape(config, torch.float32), 12, CPU)

    def forward(self, kernel: Any = attend) -> GraphedForward:
        modules = ModulesForward(None, self.model, self.cache, CPU, decode=kernel)
        check = assembly.checker(self.cache, self.expected, loading.PROBE_TOLERANCE[torch.float32])
        return GraphedForward(modules, self.model, self.cache, kernel, 96, check=check, as_graphs=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("sizes"))


def decodes(count: int) -> StepBatch:
    parts = []
    for i in range(count):
        sequence = make_sequence(str(i), [5 + i, 9, 30], 5)
        sequence.block_table, sequence.num_computed = [i], 2
        parts.append(StepPart(sequence, 1, samples=True))
    return build_batch(parts, BLOCK_SIZE)


def test_sizes_reach_as_far_as_batches_may() -> None:
    assert sizes_for(1) == (1,)
    assert sizes_for(6) == (1, 2, 4, 8)
    assert sizes_for(32) == (1, 2, 4, 8, 16, 32)
    assert sizes_for(4096) == SIZES
    spec = DeploymentSpec(name="m", path="", max_batch_size=6)
    assert assembly.largest_batch(spec) == 6
    assert assembly.largest_batch(msgspec.structs.replace(spec, sizing="gradient")) == SIZES[-1]


@torch.inference_mode()
def test_a_step_has_the_same_logits_in_every_size_and_as_it_comes(model: Model) -> None:
    forward = model.forward()
    as_it_comes = forward(decodes(3))
    forward.capture(6)
    assert forward.sizes == [1, 2, 4, 8]
    for least in (1, 4, 8):
        torch.testing.assert_close(forward.filled_up(least)(decodes(3)), as_it_comes, atol=1e-4, rtol=1e-4)
    forward(decodes(8))
    torch.testing.assert_close(forward(decodes(1)), as_it_comes[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forward(decodes(9))[:3], as_it_comes, atol=1e-4, rtol=1e-4)  # more than any size


@torch.inference_mode()
@pytest.mark.parametrize(("error", "sizes"), [(torch.OutOfMemoryError, [1, 2]), (RuntimeError, [])])
def test_steps_whose_size_cannot_be_made_ready_run_as_they_come(
    model: Model, error: type[Exception], sizes: list[int]
) -> None:
    kernel = Limited(2, error)
    forward = model.forward(kernel)
    forward.capture(6)
    num_refused = kernel.num_refused
    assert forward.extend(6) is None
    assert kernel.num_refused == num_refused, "what cannot be made ready is not tried again"
    kernel.strict = False
    assert forward.sizes == sizes
    forward.prepare(decodes(3))
    expected = model.forward()(decodes(3))
    torch.testing.assert_close(forward(decodes(3)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forward(decodes(2)), expected[:2], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_size_with_other_logits_than_the_model_s_is_not_used(model: Model) -> None:
    forward = model.forward(attend_wrongly_to_four)
    forward.capture(6)
    assert forward.sizes == [1, 2, 8]


@torch.inference_mode()
def test_sizes_for_larger_batches_are_made_ready_one_by_one_beside_what_is_served(model: Model) -> None:
    forward = model.forward()
    expected = forward(decodes(7)).clone()
    forward.capture(3)
    assert forward.sizes == [1, 2, 4]
    torch.testing.assert_close(forward(decodes(3)), expected[:3], atol=1e-4, rtol=1e-4)
    forward.prepare(decodes(2))
    before = model.cache._blocks[:, :, :-1].clone()
    assert [forward.extend(20) for _ in range(4)] == [32, 16, 8, None]
    assert forward.extend(12) is None
    assert torch.equal(model.cache._blocks[:, :, :-1], before), "sequences that are served keep what they have computed"
    assert forward.sizes == [1, 2, 4, 8, 16, 32]
    torch.testing.assert_close(forward(decodes(7)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forward.filled_up(32)(decodes(5)), expected[:5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forward(decodes(2)), expected[:2], atol=1e-4, rtol=1e-4)


def test_a_batch_that_is_made_larger_while_streams_run_gets_its_sizes_without_a_reload(
    store: redis.Redis, redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    fleet, prompts = FleetClient(store, keys, Engines.model), [[5 + i, 6, 7] for i in range(6)]
    with Engines(make_tiny_checkpoint(tmp_path), redis_url, keys) as engines:
        command = [sys.executable, "-m", "tests.integration.padded_worker"]
        engine = engines.start(command=command, max_batch_size=4)
        for i, prompt in enumerate(prompts):
            fleet.submit(str(i), prompt, 40)
        fleet.until(lambda: len(fleet.answers["0"].token_ids) > 5)
        assert engine.send("set_batch_size", {"max_batch_size": 12}, PATIENCE_S).ok
        fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.detail.endswith("up to 16 sequences"))
        fleet.until_finished()
    generator = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for i, prompt in enumerate(prompts):
        assert [*prompt, *fleet.answers[str(i)].token_ids] == generate_alone(generator, prompt, 40)


@torch.inference_mode()
def test_tables_that_were_sent_ahead_are_not_taken_for_another_step_s(model: Model) -> None:
    forward = model.forward()
    forward.capture(6)
    expected = forward(decodes(3)).clone()
    foreseen = decodes(2)
    forward.prepare(foreseen)
    torch.testing.assert_close(forward(decodes(3)), expected)
    forward.prepare(foreseen)
    foreseen.token_ids[:] = [5, 6]
    torch.testing.assert_close(forward.filled_up(4)(foreseen)[0], forward(foreseen)[0], atol=1e-4, rtol=1e-4)


def test_parts_are_grouped_with_their_like() -> None:
    lengths = [(1, 20), (3, 30), (1, 200), (70, 70), (2, 500), (90, 96), (4, 25), (1, 30)]
    parts = []
    for i, (length, context) in enumerate(lengths):
        sequence = make_sequence(str(i), [5] * context, 5)
        sequence.block_table, sequence.num_computed = [0] * 32, context - length
        parts.append(StepPart(sequence, length, samples=True))
    batch = build_batch(parts, BLOCK_SIZE)
    assert [g.tolist() for g in split(batch, by_context=True)] == [[0, 7], [1, 6], [2], [3], [4], [5]]
    assert [g.tolist() for g in split(batch, by_context=False)] == [[0, 2, 7], [1, 6], [3], [4], [5]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_device_that_is_named_is_the_current_one_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("llama", tmp_path)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert assembly.choose_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(ModelLoadError, match="no device cuda:2"):
        assembly.choose_device("cuda:2")
    spec = DeploymentSpec(name="m", path=str(tmp_path))
    with pytest.raises(ModelLoadError, match="free memory of cuda:1"):  # there is none to be read
        assembly.assemble(spec, "cuda:1")
    assert chosen == [torch.device("cuda", 1)]
