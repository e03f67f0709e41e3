"""Weights in fewer bits: what stays exact, what is rounded, and that no tokens depend on the batch around them."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional

from inference.engine import weights
from inference.engine.errors import ModelLoadError
from inference.engine.native import PackedLinear, WeightKind, load_kernels, quantize
from inference.engine.runner import ModelRunner
from inference.engine.weights import Int8Linear
from inference.messages import DeploymentSpec
from scheduling.core.sequence import Sequence
from tests.checkpoints import make_checkpoint
from tests.integration.test_engine_parity import Traffic, generate_alone, make_prompts, make_sequence

KERNELS = load_kernels()
HAS_TILES = KERNELS is not None and bool(KERNELS.has_tiles())
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(not HAS_TILES, reason="this processor has no AMX"))
    if kind == "amx"
    else kind
    for kind in get_args(WeightKind)
]
pytestmark = pytest.mark.skipif(KERNELS is None, reason="there is no C compiler")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (100, 130), (1, 1), (33, 257)])
def test_a_layer_gives_what_its_rounded_weights_give_whatever_rows_are_beside(
    kind: WeightKind, outputs: int, inputs: int
) -> None:
    torch.manual_seed(3)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(70, inputs)
    assert KERNELS is not None
    found = PackedLinear(KERNELS, weight, bias, kind)(x)
    kept = weight.bfloat16().float() if kind in ("bfloat16", "amx") else weight
    if kind == "int8":
        levels, scale = quantize(weight)
        kept = levels * scale[:, None]
    seen = x.bfloat16().float() if kind == "amx" else x
    expected = functional.linear(seen.double(), kept.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)
    layer = PackedLinear(KERNELS, weight, bias, kind)
    for rows in (1, 2, 3, 11, 12, 13, 16, 17, 31, 33, 40):
        assert torch.equal(layer(x[:rows]), found[:rows])


def test_int8_levels_are_within_half_a_step_and_rows_of_zeros_stay_zero() -> None:
    weight = torch.cat([torch.randn(7, 40) * 3, torch.zeros(1, 40)])
    levels, scale = quantize(weight)
    assert int(levels.abs().max()) == 127
    assert bool(((levels * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all())
    assert levels[-1].count_nonzero() == 0


@pytest.fixture(scope="module")
def bfloat16_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are bfloat16, with the answers that float32 arithmetic gives."""
    folder = tmp_path_factory.mktemp("bfloat16")
    make_checkpoint("qwen3", folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


def answers(runner: ModelRunner, seed: int) -> list[list[int]]:
    sequences: list[Sequence] = [make_sequence(str(i), prompt, n) for i, (prompt, n) in enumerate(make_prompts(1))]
    Traffic(runner, sequences, seed=seed).run()
    return [sequence.tokens for sequence in sequences]


def test_a_bfloat16_checkpoint_is_kept_as_it_is_and_gives_the_tokens_of_float32(bfloat16_folder: Path) -> None:
    import transformers

    runner = ModelRunner(DeploymentSpec(name="m", path=str(bfloat16_folder)), "cpu", num_blocks=40)
    assert "weights kept in bfloat16, arithmetic in float32 (logits off by 0.0%" in runner.describe()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(bfloat16_folder, dtype=torch.float32).eval()
    assert answers(runner, 5) == [generate_alone(model, prompt, n) for prompt, n in make_prompts(1)]


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["fused", "modules"])
@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rounded_weights_give_the_same_tokens_in_any_batch(
    architecture: str, settings: dict[str, Any], options: dict[str, bool], tmp_path: Path
) -> None:
    make_checkpoint(architecture, tmp_path)
    spec = DeploymentSpec(name="m", path=str(tmp_path), **settings)
    runner = ModelRunner(spec, "cpu", num_blocks=40, **options)
    assert "logits off by" in runner.describe()
    assert "off by 0.0%" not in runner.describe()
    mixed = answers(runner, 5)
    alone = []
    for i, (prompt, n) in enumerate(make_prompts(1)):
        sequence = make_sequence(str(i), prompt, n)
        Traffic(runner, [sequence], seed=9).run()
        alone.append(sequence.tokens)
    assert mixed == alone


def test_int8_by_torch_gives_what_int8_by_our_kernels_gives(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    spec = DeploymentSpec(name="m", path=str(tmp_path), quantization="int8")
    ours, torchs = (ModelRunner(spec, "cpu", num_blocks=40, native=native) for native in (True, False))
    assert "int8" in torchs.describe()
    same = [a == b for a, b in zip(answers(ours, 5), answers(torchs, 5), strict=True)]
    assert sum(same) >= 8


def test_where_torch_has_no_int8_products_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> torch.Tensor:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(Int8Linear, "forward", refuse)
    with pytest.raises(ModelLoadError, match="no int8 weights on cpu"):
        weights._check_int8(torch.zeros(1))
