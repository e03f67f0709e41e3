"""A runner loads what it can serve, refuses the rest with a sentence, and lets one bad part fail alone."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from inference import host_memory
from inference.checkpoint import CheckpointError
from inference.engine import loading, native
from inference.engine.errors import DeviceLost, ModelLoadError, OutOfDeviceMemory
from inference.engine.memory import explaining
from inference.engine.native import load_kernels
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.sequence import PartResult, SamplingParams, Sequence, StepPart
from tests.checkpoints import SIZES, VOCAB, make_checkpoint
from tests.integration.test_engine_parity import Traffic, generate_alone, make_prompts, make_sequence
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path)
    return path


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    return ModelRunner(DeploymentSpec(name="m", path=str(folder)), "cpu", num_blocks=20)


def prefill(name: str, tokens: list[int], blocks: list[int]) -> StepPart:
    sequence = make_sequence(name, tokens, 5)
    sequence.block_table = blocks
    return StepPart(sequence, len(tokens), samples=True)


def save(config: Any, path: Path) -> DeploymentSpec:
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return DeploymentSpec(name="m", path=str(path))


def test_it_says_what_it_chose(runner: ModelRunner) -> None:
    assert "LlamaForCausalLM in float32 on cpu" in runner.describe()
    assert "20 blocks of 16 tokens" in runner.describe()
    assert (runner.max_model_len, runner.vocab_size, set(runner.eos_token_ids)) == (256, VOCAB, {2})


def test_an_end_token_without_a_logit_is_no_reason_to_fail(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, VOCAB + 7]}))
    runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path / "m")), "cpu", num_blocks=20)
    sequence = make_sequence("a", [5, 6, 7], 5, sampling=SamplingParams(temperature=0.0, min_tokens=3))
    sequence.block_table = [0]
    (result,) = runner.step([StepPart(sequence, 3, samples=True)])
    assert result.error is None


def test_the_cache_is_sized_for_the_batch_or_as_asked(folder: Path) -> None:
    spec = DeploymentSpec(name="m", path=str(folder), max_batch_size=3, max_model_len=100)
    runner = ModelRunner(spec, "cpu")
    assert runner.num_blocks == 3 * 7
    assert "3 sequences of 100 tokens" in runner.describe()
    spec = DeploymentSpec(name="m", path=str(folder), kv_memory_bytes=40 * 16 * 3 * 2 * 2 * 16 * 4)
    assert ModelRunner(spec, "cpu").num_blocks == 40


def test_a_cache_that_holds_no_whole_sequence_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="less than one sequence of 256"):
        ModelRunner(DeploymentSpec(name="m", path=str(folder), kv_memory_bytes=100_000), "cpu")


def test_more_context_than_the_model_has_is_refused(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="can place 256 tokens"):
        ModelRunner(DeploymentSpec(name="m", path=str(folder), max_model_len=300), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="no CUDA device"):
        ModelRunner(DeploymentSpec(name="m", path=str(folder)), "cuda")


def test_attention_sinks_and_recurrent_layers_are_refused(tmp_path: Path) -> None:
    sizes = {**SIZES, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    with pytest.raises(ModelLoadError, match="Attention sinks are not supported"):
        ModelRunner(save(transformers.GptOssConfig(**sizes), tmp_path / "sinks"), "cpu", num_blocks=8)
    bloom = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2)
    with pytest.raises(ModelLoadError, match="cannot be served by this engine"):
        ModelRunner(save(bloom, tmp_path / "alibi"), "cpu", num_blocks=8)


def test_frequencies_that_depend_on_the_batch_are_served_to_their_original_length_only(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    spec = save(transformers.LlamaConfig(**SIZES, rope_parameters=rope), tmp_path)
    assert ModelRunner(spec, "cpu", num_blocks=8).max_model_len == 64


def test_a_part_that_cannot_be_computed_fails_alone(runner: ModelRunner) -> None:
    good = prefill("good", [5, 6, 7], [0])
    bad = [
        (prefill("vocabulary", [5, VOCAB, 7], [1]), f"Token id {VOCAB} is outside the vocabulary"),
        (prefill("negative", [5, -1], [1]), "Token id -1 is outside"),
        (prefill("blocks", [5] * 17, [1]), "1 KV blocks of 16 tokens do not hold 17"),
        (prefill("no such block", [5], [20]), "a block outside the 20"),
        (prefill("length", [5] * 260, list(range(17))), "at most 256"),
        (StepPart(make_sequence("empty", [5], 1), 0, samples=False), "covers tokens 0 to 0 of 1"),
        (StepPart(prefill("early", [5, 6], [1]).sequence, 1, samples=True), "before the sequence's end"),
    ]
    alone = runner.step([good])[0]
    results = runner.step([good, *(part for part, _ in bad)])
    assert results[0] == alone
    for result, (_, sentence) in zip(results[1:], bad, strict=True):
        assert result.token_id is None
        assert sentence in (result.error or "")


def test_an_empty_step_is_nothing(runner: ModelRunner) -> None:
    assert runner.step([]) == []


def test_a_step_does_not_change_its_sequences(runner: ModelRunner) -> None:
    part = prefill("same", [5, 6, 7], [3])
    assert runner.step([part]) == runner.step([part])
    assert (part.sequence.tokens, part.sequence.num_computed, part.sequence.block_table) == ([5, 6, 7], 0, [3])


def test_an_exception_in_the_forward_pass_fails_its_culprit_only(runner: ModelRunner) -> None:
    parts = [prefill(str(i), [10 + i, 20, 30], [i]) for i in range(7)]
    expected = runner.step(parts)
    forward, culprit = runner._forward, 14

    def fail(batch: Any) -> torch.Tensor:
        if culprit in batch.token_ids:
            raise RuntimeError("a kernel refused this shape")
        return forward(batch)

    runner._forward = fail
    try:
        results = runner.step(parts)
    finally:
        runner._forward = forward
    assert results[4] == PartResult(error="The forward pass failed (RuntimeError).")
    assert results[:4] + results[5:] == expected[:4] + expected[5:]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_an_error_of_its_own(runner: ModelRunner, error: Exception) -> None:
    forward = runner._forward

    def exhaust(batch: Any) -> torch.Tensor:
        raise error

    runner._forward = exhaust
    try:
        with pytest.raises(OutOfDeviceMemory, match="smaller step"):
            runner.step([prefill("a", [5], [0])])
    finally:
        runner._forward = forward


def test_a_device_that_a_kernel_of_another_library_finds_lost_costs_no_request(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: Any) -> torch.Tensor:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    def synchronize(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "_forward", fail)
    monkeypatch.setattr(runner, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert runner.step([prefill("a", [5], [0])])[0].error == "The forward pass failed (RuntimeError)."
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(DeviceLost):
        runner.step([prefill("a", [5], [0])])


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"native": False}])
def test_a_sequence_that_turns_to_nan_leaves_the_others_and_its_blocks_unharmed(
    tmp_path: Path, options: dict[str, bool]
) -> None:
    model = make_checkpoint("llama", tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = math.nan
    model.save_pretrained(tmp_path)
    runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path)), "cpu", num_blocks=20, **options)
    others = [prefill(str(i), [10 + i, 20, 30], [i]) for i in range(3)]
    expected = runner.step(others)
    results = runner.step([others[0], prefill("nan", [10, 9, 30] * 6, [5, 6]), *others[1:]])
    assert "not finite" in (results[1].error or "")
    assert [results[0], *results[2:]] == expected
    reused = [StepPart(s.sequence, 3, samples=True) for s in others]
    for part, block in zip(reused, (5, 6, 7), strict=True):
        part.sequence.block_table = [block]
    assert runner.step(reused) == expected


def test_without_a_working_compiler_there_are_no_kernels(tmp_path: Path) -> None:
    assert load_kernels("/nonexistent/compiler", tmp_path) is None
    assert load_kernels("/bin/false", tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_kernels_are_built_once_for_a_processor(tmp_path: Path) -> None:
    assert load_kernels(None, tmp_path / "build") is not None
    (library,) = (tmp_path / "build").iterdir()
    load_kernels.cache_clear()
    assert load_kernels("/bin/false", tmp_path / "build") is not None
    assert list((tmp_path / "build").iterdir()) == [library]


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """One that notes its runs in a file beside it, and is quick: it optimises nothing."""
    path = tmp_path / "compiler"
    path.write_text(f'#!/bin/sh\necho >> {tmp_path}/runs\nexec cc "$@" -O0\n')
    path.chmod(0o755)
    return path


def test_processes_that_start_together_compile_once(tmp_path: Path, compiler: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from inference.engine.native import load_kernels; "
        "sys.exit(load_kernels(sys.argv[1], Path(sys.argv[2])) is None)"
    )
    command = [sys.executable, "-c", code, str(compiler), str(tmp_path / "build")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0, 0]
    assert (tmp_path / "runs").read_text() == "\n"


def test_where_the_first_folder_may_not_be_written_or_not_be_trusted_the_next_is_taken(
    tmp_path: Path, compiler: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "anyone").mkdir()
    (tmp_path / "anyone").chmod(0o777)
    folders = [tmp_path / "file" / "build", tmp_path / "anyone", tmp_path / "cache" / "build"]
    library = native._find_library(str(compiler), folders)
    assert library is not None
    assert library.parent == folders[2]
    assert native._find_library(None, folders) == library
    assert list((tmp_path / "anyone").iterdir()) == []
    assert native._find_library(str(compiler), folders[:2]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_a_cuda_device_gives_the_tokens_of_generate(architecture: str, tmp_path: Path) -> None:
    model = make_checkpoint(architecture, tmp_path)
    runner = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path), dtype="float32"), "cuda", num_blocks=40)
    prompts = make_prompts(1)
    sequences: list[Sequence] = [make_sequence(str(i), prompt, n) for i, (prompt, n) in enumerate(prompts)]
    Traffic(runner, sequences, seed=5).run()
    assert [s.tokens for s in sequences] == [generate_alone(model, prompt, n) for prompt, n in prompts]
    default = ModelRunner(DeploymentSpec(name="m", path=str(tmp_path)), "cuda", num_blocks=40)
    assert "bfloat16" in default.describe()


def test_a_checkpoint_that_lacks_weights_is_refused_and_loading_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "PROGRESS_S", 0.0)
    caplog.set_level("INFO", logger=loading.__name__)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight first"):
        ModelRunner(DeploymentSpec(name="m", path=str(tmp_path)), "cpu", num_blocks=8)
    assert any(" % of " in message for message in caplog.messages)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": "abc"}, {"intermediate_size": 10**9}, {"rms_norm_eps": "x"}, {"rope_parameters": "abc"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": "x"}},
        {"rope_parameters": {"rope_type": "llama3"}}, {"num_hidden_layers": True}, {"num_attention_heads": 7},
        {"num_key_value_heads": 3}, {"head_dim": 2**31 - 1}, {"layer_types": ["full_attention"]}, {"layer_types": "x"},
        {"layer_types": ["x", "y", "z"]}, {"hidden_act": "no such thing"}, {"dtype": [1]},
        {"model_type": "no such thing"}, {"model_type": ["llama"]}, {"text_config": [1]}, {"pad_token_id": 10**9},
        {"max_position_embeddings": 2**31 - 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_configuration_is_refused_with_a_sentence(
    folder: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((CheckpointError, ModelLoadError)) as refusal:
        ModelRunner(DeploymentSpec(name="m", path=str(tmp_path / "m")), "cpu")
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    ("room", "fields", "sentence"),
    [
        (2**18, {}, r"The weights take 0\.\d+ GiB, and 0\.00 GiB of memory are free on cpu\. End what else"),
        (2**30, {"kv_memory_bytes": 2**31}, r"and the KV cache 2\.00 GiB, and 1\.00 GiB of memory are free"),
    ],
)
def test_more_than_the_memory_that_is_free_is_not_begun_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int, fields: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "memory.max").write_text(str(room))
    (tmp_path / "memory.current").write_text("0")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/")
    with pytest.raises(ModelLoadError, match=sentence):
        ModelRunner(DeploymentSpec(name="m", path=str(folder), **fields), "cpu")


class NoMemory(TorchDispatchMode):
    """A device that has no memory for a tensor of so many bytes, or for one operation."""

    def __init__(self, *, most_bytes: int = 2**60, operation: Any = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most_bytes, self._operation = most_bytes, operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._operation:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.nbytes > self._most_bytes:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory")
        return result


@pytest.mark.parametrize(
    ("short", "sentence"),
    [
        (NoMemory(most_bytes=2**20), "There is no place for a KV cache of 12 MiB: Memory is short"),
        (NoMemory(operation=torch.ops.aten.embedding.default), "cannot be served by this engine: Memory is short"),
    ],
)
def test_memory_that_is_short_while_loading_is_said_in_a_sentence(folder: Path, short: NoMemory, sentence: str) -> None:
    with short, pytest.raises(ModelLoadError, match=sentence):
        ModelRunner(DeploymentSpec(name="m", path=str(folder), max_batch_size=64), "cpu", native=False)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), r"^It failed: Memory is short\. End what else takes memory"),
        (RuntimeError("CUDA error: out of memory"), "Memory is short"),
        (MemoryError(), "Memory is short"),
        (SafetensorError("header too large"), r"^It failed: header too large\. Mend it\.$"),
        (KeyError("a\n  b"), r"^It failed: 'a\\n b'\. Mend it\.$"),
        (KeyError("yarn"), r"^It failed: KeyError: 'yarn'\. Mend it\.$"),
        (RecursionError(), r"^It failed: RecursionError\. Mend it\.$"),
    ],
)
def test_whatever_libraries_raise_becomes_a_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(ModelLoadError, match=sentence), explaining("It failed", "Mend it."):
        raise error


def test_weights_that_do_not_belong_to_the_configuration_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 77}))
    sentence = r"cannot be loaded: its weights have other shapes than its configuration asks for\. Download it again"
    with pytest.raises(ModelLoadError, match=sentence):
        ModelRunner(DeploymentSpec(name="m", path=str(tmp_path)), "cpu")
