"""The CUDA path: its kernel in Triton's interpreter and its padded decode steps on any machine, all of it on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inference.engine.attention import Rule
from inference.engine.batch import build_batch, foresee_batch
from inference.engine.graphs import no_waiting
from inference.engine.kv_cache import BLOCK_SIZE, KVCache, KVShape
from inference.engine.loading import load_config, load_model
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.sequence import SamplingParams, Sequence, StepPart
from tests.checkpoints import make_checkpoint
from tests.integration.test_engine_parity import Traffic, generate_alone, gpu, make_prompts, make_sequence

LAID_OUT = ("positions", "slots", "query_starts", "context_lens", "block_tables", "sample_rows", "part_of")
ON_GPU = torch.cuda.is_available()
SAMPLED = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1, top_k=5, min_p=0.1, logprobs=3),
    SamplingParams(seed=2, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias=((7, 3.0),)),
    SamplingParams(seed=3, min_tokens=9, presence_penalty=0.3),
]
CASES = [
    {"heads": 4, "kv_heads": 2, "dim": 16, "contexts": [1, 16, 17, 150], "window": 0, "softcap": 0.0},
    {"heads": 6, "kv_heads": 6, "dim": 20, "contexts": [33, 90], "window": 24, "softcap": 0.0},
    {"heads": 8, "kv_heads": 1, "dim": 32, "contexts": [200, 5, 64], "window": 0, "softcap": 30.0},
    {"heads": 4, "kv_heads": 2, "dim": 20, "contexts": [64, 3], "window": 0, "softcap": 0.0},  # not split
    {"heads": 4, "kv_heads": 2, "dim": 16, "contexts": [400, 300], "window": 150, "softcap": 0.0},
]


def expected_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, case: Any) -> torch.Tensor:
    """One question [heads, dim] over keys and values [tokens, kv_heads, dim], by the definition."""
    group = case["heads"] // case["kv_heads"]
    k, v = (t[-case["window"] :] if case["window"] else t for t in (k, v))
    scores = torch.einsum("hd,thd->ht", q, k.repeat_interleave(group, 1)) * scale
    if case["softcap"]:
        scores = torch.tanh(scores / case["softcap"]) * case["softcap"]
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v.repeat_interleave(group, 1))


def check_kernel(case: Any, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Raise AssertionError where the kernel's answer is not the definition's; blocks lie scattered, the rest is NaN."""
    from inference.engine.paged_triton import attend_decodes

    torch.manual_seed(0)
    contexts, dim, kv_heads = case["contexts"], case["dim"], case["kv_heads"]
    width = -(-max(contexts) // BLOCK_SIZE)
    cache = KVCache(KVShape(1, kv_heads, dim, dtype), 64, torch.device(device))
    cache.keys[0].fill_(float("nan"))
    cache.values[0].fill_(float("nan"))
    order = torch.randperm(64).tolist()
    tables = torch.zeros((len(contexts), width), dtype=torch.int32)
    query = torch.randn(len(contexts), case["heads"], dim, dtype=dtype)
    expected = []
    for i, context in enumerate(contexts):
        k, v = (torch.randn(context, kv_heads, dim, dtype=dtype) for _ in range(2))
        for t in range(context):
            if t % BLOCK_SIZE == 0:
                tables[i, t // BLOCK_SIZE] = order.pop()
            block = int(tables[i, t // BLOCK_SIZE])
            cache.keys[0][block, :, :, t % BLOCK_SIZE] = k[t].to(device)
            cache.values[0][block, :, t % BLOCK_SIZE] = v[t].to(device)
        expected.append(expected_attention(query[i].float(), k.float(), v.float(), 0.2, case))
    found = attend_decodes(
        query.to(device), cache.keys[0], cache.values[0], tables.to(device), torch.tensor(contexts, device=device),
        Rule(0.2, case["window"], case["softcap"]),
    )  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float().cpu(), torch.stack(expected), atol=tolerance, rtol=tolerance)


def check_padded_decodes(folder: Path, tokens: list[list[int]]) -> None:
    """Raise AssertionError where decode steps filled up to a size give other tokens than the last three of `tokens`."""
    from inference.engine.graphs import GraphedForward
    from inference.engine.loading import kv_shape
    from inference.engine.modules import ModulesForward
    from inference.engine.paged_triton import attend_decodes

    device = torch.device("cpu")
    config = load_config(folder)
    model = load_model(folder, config, torch.float32, device)
    cache = KVCache(kv_shape(config, torch.float32), 40, device)
    modules = ModulesForward(None, model, cache, device, "float32", attend_decodes)
    forward = GraphedForward(modules, model, cache, attend_decodes, 256, as_graphs=False)
    sequences: list[Sequence] = []
    for i, expected in enumerate(tokens):
        sequence = make_sequence(str(i), expected[:-3], 3)
        sequence.block_table = list(range(i * 8, i * 8 + 8))
        sequences.append(sequence)
    with torch.inference_mode():
        forward.capture(5)
        assert forward.sizes == [1, 2, 4, 8], "five sequences are filled up to eight"
        ahead = None
        for _ in range(3):
            parts = [StepPart(s, len(s.tokens) - s.num_computed, samples=True) for s in sequences]
            batch = build_batch(parts, BLOCK_SIZE)
            if ahead is not None:
                assert all(np.array_equal(getattr(batch, n), getattr(ahead, n)) for n in LAID_OUT)
                ahead.token_ids[:] = batch.token_ids
            logits = forward(ahead or batch)
            assert logits.shape[0] == len(parts)
            ahead = foresee_batch(sequences, BLOCK_SIZE)
            forward.prepare(ahead)
            assert forward._prepared == (ahead, 4), "its tables are there before its tokens"
            for sequence, row in zip(sequences, logits, strict=True):
                sequence.num_computed = len(sequence.tokens)
                sequence.tokens.append(int(row.argmax()))
    assert [s.tokens for s in sequences] == tokens


def in_interpreter(*arguments: str) -> None:
    """Run this file with Triton's interpreter, which has to be chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(ON_GPU, reason="the kernel is compiled here")
def test_the_decode_kernel_gives_attention_by_its_definition() -> None:
    pytest.importorskip("triton")
    in_interpreter("kernel")


@pytest.mark.skipif(ON_GPU, reason="the kernel is compiled here")
@pytest.mark.parametrize("whole", [True, False])
def test_the_decode_kernel_compiles_for_a_gpu_that_is_not_here(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from inference.engine import paged_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sums = "*bf16" if whole else "*fp32"
    kernels: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (
            paged_triton._attend,
            dict.fromkeys(("query", "keys", "values", "out"), "*bf16")
            | {"tables": "*i32", "contexts": "*i64", "sums": sums, "tops": sums, "totals": sums}
            | {"scale": "fp32", "softcap": "fp32", "window": "i32", "width": "i32", "kv_heads": "i32"},
            {"GROUP": 4, "ROWS": 16, "DIM": 80, "PADDED": 128, "BLOCK": 16, "TOKENS": 64, "WHOLE": whole},
        ),
        (
            paged_triton._merge,
            {"out": "*bf16", "sums": "*fp32", "tops": "*fp32", "totals": "*fp32", "splits": "i32"},
            {"DIM": 80, "PADDED": 128, "MOST": 16},
        ),
    ]
    for kernel, arguments, constants in kernels:
        signature = arguments | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert "ptx" in compile_kernel(source, target=GPUTarget("cuda", 90, 32)).asm


@pytest.mark.skipif(ON_GPU, reason="the kernel is compiled here")
def test_decode_steps_filled_up_to_a_size_give_the_tokens_of_generate(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    model = make_checkpoint("llama", tmp_path)
    prompts = [prompt for prompt, _ in make_prompts(1) if 3 < len(prompt) < 50][:3]
    tokens = [generate_alone(model, prompt, 3) for prompt in prompts]
    in_interpreter("decodes", str(tmp_path), json.dumps(tokens))


@pytest.mark.parametrize("case", [pytest.param(case, marks=gpu) for case in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_decode_kernel_gives_attention_by_its_definition(case: Any, dtype: torch.dtype) -> None:
    check_kernel(case, "cuda", dtype)


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=gpu) for name in ("llama", "qwen3", "gemma2")])
def test_captured_decode_steps_give_the_tokens_of_generate(architecture: str, tmp_path: Path) -> None:
    model = make_checkpoint(architecture, tmp_path)
    runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path), dtype="float32"), "cuda", num_blocks=40)
    assert "CUDA graphs over a Triton kernel" in runner.describe()
    sequences = [make_sequence(str(i), prompt, n) for i, (prompt, n) in enumerate(make_prompts(1))]
    Traffic(runner, sequences, seed=5).run()
    assert [s.tokens for s in sequences] == [generate_alone(model, prompt, n) for prompt, n in make_prompts(1)]


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=gpu) for name in ("llama", "gemma2")])
def test_sizes_captured_after_steps_give_the_tokens_of_generate(architecture: str, tmp_path: Path) -> None:
    model = make_checkpoint(architecture, tmp_path)
    spec = DeploymentSpec(name="m", path=str(tmp_path), dtype="float32", max_batch_size=1)
    runner = ModelRunner(spec, "cuda", num_blocks=40)
    expected = [generate_alone(model, prompt, n) for prompt, n in make_prompts(1)]
    for batch_size in (1, 8, 20):
        while runner.make_ready(batch_size):
            pass
        sequences = [make_sequence(str(i), prompt, n) for i, (prompt, n) in enumerate(make_prompts(1))]
        Traffic(runner, sequences, seed=5).run()
        assert [s.tokens for s in sequences] == expected
    assert runner.describe().endswith("decode steps of up to 32 sequences")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_batches_of_many_sizes_give_the_tokens_of_generate(device: str, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path)
    spec = DeploymentSpec(name="m", path=str(tmp_path), dtype="float32", max_batch_size=60)
    runner = ModelRunner(spec, device, num_blocks=150)
    if device == "cuda":
        assert "of up to 64 sequences as CUDA graphs" in runner.describe()
    prompts = [([5 + i, 7, 9 + i], 4 + i % 5) for i in range(50)]
    sequences = [make_sequence(str(i), prompt, n) for i, (prompt, n) in enumerate(prompts)]
    for i, sequence in enumerate(sequences):
        sequence.block_table = [i]
    going = list(sequences)
    while going:
        results = runner.step([StepPart(s, len(s.tokens) - s.num_computed, samples=True) for s in going])
        for sequence, result in zip(going, results, strict=True):
            assert result.token_id is not None
            sequence.num_computed = len(sequence.tokens)
            sequence.tokens.append(result.token_id)
        going = [s for s in going if s.num_output_tokens < s.max_tokens][: len(going) - 3]
    for sequence, (prompt, n) in zip(sequences, prompts, strict=True):
        assert sequence.tokens == generate_alone(model, prompt, n)[: len(sequence.tokens)]


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=gpu) for name in ("llama", "gemma2")])
def test_bfloat16_decodes_have_the_logits_of_the_model_itself(architecture: str, tmp_path: Path) -> None:
    """In steps of one, that are replayed, as in one part of many tokens, that is not."""
    make_checkpoint(architecture, tmp_path)
    runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path)), "cuda", num_blocks=40)
    assert "bfloat16" in runner.describe()
    assert "CUDA graphs over a Triton kernel" in runner.describe()
    one = make_sequence("one", [5 + i % 90 for i in range(80)], 1)
    one.block_table = [3, 1, 4, 10, 5]
    with torch.inference_mode():
        batch = build_batch([StepPart(one, 80, samples=False)], BLOCK_SIZE)
        batch.sample_rows = np.arange(80)
        expected = runner._forward(batch)
        found = []
        for i in range(80):
            one.num_computed = i
            batch = build_batch([StepPart(one, 1, samples=False)], BLOCK_SIZE)
            batch.sample_rows = np.arange(1)
            found.append(runner._forward(batch).clone())
    assert float((torch.cat(found) - expected).abs().max() / expected.std()) < 0.25


@pytest.mark.parametrize("params", [pytest.param(one, marks=gpu) for one in SAMPLED])
def test_a_step_waits_for_the_device_at_its_end_alone(
    params: SamplingParams, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint("llama", tmp_path)
    runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path), max_batch_size=4), "cuda", num_blocks=40)
    forward, batches = runner._forward, list[Any]()

    def note(batch: Any) -> torch.Tensor:
        batches.append(batch)
        return forward(batch)

    runner._forward = note
    sequences = [make_sequence(str(i), [5 + i, 6, 7], 30, params) for i in range(3)]
    for i, sequence in enumerate(sequences):
        sequence.block_table = [2 * i, 2 * i + 1]
    for step in range(6):
        parts = [StepPart(s, len(s.tokens) - s.num_computed, samples=True) for s in sequences]
        with no_waiting():
            wait = runner.start(parts)
            runner.foresee(sequences)
        for sequence, result in zip(sequences, wait(), strict=True):
            assert result.token_id is not None
            sequence.num_computed = len(sequence.tokens)
            sequence.tokens.append(result.token_id)
        assert runner.num_foreseen == step, "all but the prompts"
        assert len(batches) == step + 1, "what waits raises, and the step is computed again in halves"
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "so does sampling, one by one"


@pytest.mark.parametrize("settings", [pytest.param({"quantization": "int8"}, marks=gpu)])
def test_int8_weights_on_a_gpu_are_served_or_refused_with_a_sentence(settings: Any, tmp_path: Path) -> None:
    from inference.engine.errors import ModelLoadError

    make_checkpoint("llama", tmp_path)
    try:
        runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path), **settings), "cuda", num_blocks=40)
    except ModelLoadError as error:
        assert "int8" in str(error)  # noqa: PT017
    else:
        assert "weights kept in int8" in runner.describe()


@pytest.mark.parametrize("pairs", [pytest.param([(0, 1), (5, 0)], marks=gpu)])
def test_blocks_swapped_beside_running_steps_come_back(pairs: list[tuple[int, int]]) -> None:
    cache = KVCache(KVShape(4, 2, 64, torch.bfloat16), 8, torch.device("cuda"), num_host_blocks=2)
    for layer in (*cache.keys, *cache.values):
        layer.normal_()
    before = [layer.clone() for layer in (*cache.keys, *cache.values)]
    cache.swap_out(pairs)
    for layer in (*cache.keys, *cache.values):
        layer[[0, 5]] = np.nan
    cache.swap_in([(b, a) for a, b in pairs])
    for layer, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(layer, old)


if __name__ == "__main__":
    if sys.argv[1] == "kernel":
        for each in CASES:
            check_kernel(each, "cpu")
    else:
        check_padded_decodes(Path(sys.argv[2]), json.loads(sys.argv[3]))
