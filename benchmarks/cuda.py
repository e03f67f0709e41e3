"""The GPU's figures: decode steps of a model of a billion random bfloat16 weights beside the limit of its memory.

`python -m benchmarks.engine --device cuda [--rounds 3] [--json FILE]`. A decode step reads every weight once and the
keys and values of its contexts; the limit is that over the bandwidth that a copy reaches on the same device in the same
run. Steps follow each other as the engine runs them: each laid out and sent ahead while the one before it runs.
transformers' continuous batching runs the same requests on the same checkpoint.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml
import torch
import transformers

from benchmarks.modes import (
    Answers,
    Request,
    drive,
    make_sequence,
    make_workload,
    run_transformers_continuous,
)
from benchmarks.roofline import MeteredRunner, Rates, Work
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import Sequence, StepPart

CONFIG: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = 512
MAX_MODEL_LEN = 1024
STEPS = 20
WARM_UP_STEPS = 3
COPY_BYTES = 2 * 2**30
REQUESTS = 256
SLOTS = 64
STEP_TOKENS = 2048


def measure(rounds: int) -> dict[str, Any]:
    """Steps over batch sizes, then a workload beside transformers."""
    device = torch.device("cuda")
    rates = Rates(_flops_per_s(device), _bytes_per_s(device))
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"  {rates.flops_per_s / 1e12:.0f} TFLOP/s in bfloat16, {rates.bytes_per_s / 1e9:.0f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        path = _make_checkpoint(Path(folder))
        runner = ModelRunner(_spec(path), "cuda")
        print(f"  {runner.describe()}")
        work = Work.of(CONFIG)
        metered = MeteredRunner(runner, work, rates, weight_bytes=2)
        steps = {batch: measure_steps(metered, batch) for batch in BATCHES}
        try:
            served = _serve_beside_transformers(metered, path, rounds)
        except Exception as error:  # whatever it is, the steps were measured
            served = {"missing": f"{type(error).__name__}: {error}"}
            print(f"  The workload did not end: {served['missing']}")
    return {**machine, "rates": rates._asdict(), "engine": runner.describe(), "steps": steps, "served": served}


def _spec(path: Path) -> DeploymentSpec:
    """A KV cache for the largest batch, where a GPU is small for half of its memory: transformers needs room too."""
    kv_bytes = BATCHES[-1] * (CONTEXT + 64) * 2 * CONFIG["num_hidden_layers"] * Work.of(CONFIG).kv_dim * 2
    torch.cuda.empty_cache()  # of what the rates were measured with
    kv_bytes = min(kv_bytes, torch.cuda.mem_get_info()[0] // 2)
    return DeploymentSpec(
        name="bench", path=str(path), dtype="bfloat16", max_batch_size=BATCHES[-1], kv_memory_bytes=kv_bytes
    )


def describe() -> dict[str, str]:
    """What the figures are of, and how they were made."""
    found = {
        "device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "torch": torch.__version__,
        "command": " ".join(["python -m benchmarks.engine", *sys.argv[1:]]),
    }  # fmt: skip
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    return found


def _make_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=True)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def measure_steps(runner: MeteredRunner, batch: int, context: int = CONTEXT, steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of a decode step, its tokens on the host included, and its share of the limit.

    `foreseen` is how many began as they were foreseen: all, or something is wrong.
    """
    blocks, sequences = -(-(context + WARM_UP_STEPS + steps) // runner.block_size), []
    if batch * blocks > runner.num_blocks:
        return {}
    for i in range(batch):
        sequence = make_sequence(i, Request([5 + i] * context, WARM_UP_STEPS + steps))
        sequence.num_computed = context - 1
        sequence.block_table = list(range(i * blocks, (i + 1) * blocks))
        sequences.append(sequence)
    _decode(runner, sequences, WARM_UP_STEPS)
    runner.reset()
    steps_s, foreseen = _decode(runner, sequences, steps), runner.runner.num_foreseen
    step_s, least_s = statistics.median(steps_s), runner.least_s / steps
    share = least_s / step_s
    print(f"  batch {batch:>3}: {step_s * 1000:.2f} ms, {batch / step_s:,.0f} tokens/s, {share:.0%} of the limit")
    return {"step_ms": step_s * 1000, "least_ms": least_s * 1000, "of_limit": share, "foreseen": foreseen}


def _decode(runner: MeteredRunner, sequences: list[Sequence], steps: int) -> list[float]:
    """Seconds of each step, as the engine's loop runs them; what it does with the tokens is not among them."""
    times, parts = [], [StepPart(sequence, 1, samples=True) for sequence in sequences]
    runner.runner.num_foreseen = 0
    for _ in range(steps):
        started = time.perf_counter()
        wait = runner.start(parts)
        if runner.runner.runs_ahead:
            runner.runner.foresee(sequences)
        results = wait()
        times.append(time.perf_counter() - started)
        for sequence, result in zip(sequences, results, strict=True):
            assert result.token_id is not None
            sequence.tokens.append(result.token_id)
            sequence.num_computed += 1
    return times


def _serve_beside_transformers(runner: MeteredRunner, path: Path, rounds: int) -> dict[str, Any]:
    workload = make_workload(REQUESTS, CONFIG["vocab_size"])
    tokens = sum(request.num_tokens for request in workload)
    found: dict[str, list[float]] = {"ours": [], "transformers continuous": []}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval().to("cuda")
    _serve(runner, workload[:SLOTS])
    run_transformers_continuous(model, workload[:4], SLOTS, STEP_TOKENS)
    for _ in range(rounds):
        for name in found:
            start = time.perf_counter()
            _serve(runner, workload) if name == "ours" else run_transformers_continuous(
                model, workload, SLOTS, STEP_TOKENS
            )
            found[name].append(tokens / (time.perf_counter() - start))
            print(f"  {name}: {found[name][-1]:,.0f} tokens/s", flush=True)
    ratio = statistics.median(found["ours"]) / statistics.median(found["transformers continuous"])
    print(f"  {ratio:.2f} times transformers' continuous batching; {runner.outside:.1%} outside forward and sampling")
    return {"tokens_per_s": found, "ratio": ratio, "outside": runner.outside}


def _serve(runner: MeteredRunner, workload: list[Request]) -> Answers:
    runner.reset()
    allocator = BlockAllocator(runner.num_blocks, runner.block_size)
    planner = StepPlanner("continuous", SLOTS, STEP_TOKENS, allocator, runner.max_model_len, time.monotonic)
    return drive(planner, runner, [make_sequence(i, request) for i, request in enumerate(workload)])


def _seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """The shortest of several, by the device's own clock."""
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


def _bytes_per_s(device: torch.device) -> float:
    """Read and written by a copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _seconds(lambda: target.copy_(source))


def _flops_per_s(device: torch.device) -> float:
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * 8192**3 / _seconds(lambda: a @ b)
