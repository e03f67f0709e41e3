"""Throughput of the four batching modes on one workload, beside transformers' own batching, in one run.

    python -m benchmarks.modes [--sizes demo,100m] [--rounds 3] [--requests 64] [--threads N] [--json FILE]

All start with the same requests waiting, and every request asks for its own number of tokens (end-of-sequence tokens
are ignored), greedy, in float32. A tokens/s figure counts the tokens asked for. Rounds are interleaved; medians with
the smallest and largest, and ratios of medians. Processor seconds are the process's, the fewest of the rounds: on a
shared machine they say more than the clock. Beside them the share of the limit: the least processor time of the very
steps of that mode (benchmarks/roofline.py) over the time they took.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import transformers

from benchmarks.roofline import MeteredRunner, Work, measure_rates
from inference.engine.runner import ModelRunner
from inference.messages import BatchMode, DeploymentSpec
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import SamplingParams, Sequence

SLOTS = 16
STEP_TOKENS = 512
MAX_MODEL_LEN = 512
SIZES: dict[str, dict[str, Any]] = {
    "demo": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "100m": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4,
    },
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)

Answers = list[list[int]]


class Request(NamedTuple):
    """A prompt, and how many tokens are wanted."""

    prompt: list[int]
    num_tokens: int


def make_workload(num_requests: int, vocab_size: int, seed: int = 1) -> list[Request]:
    """Prompts of 16 to 256 tokens, answers of 8 to 256: Pareto with shape 0.8, cut at 256."""
    rng = random.Random(seed)
    requests = []
    for _ in range(num_requests):
        prompt = [rng.randrange(3, vocab_size) for _ in range(rng.randint(16, 256))]
        requests.append(Request(prompt, min(256, int(8 * rng.paretovariate(0.8)))))
    return requests


def make_checkpoint(size: str, folder: Path) -> Path:
    """A random Llama checkpoint, seeded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES[size], max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / size)
    return folder / size


def run_ours(runner: MeteredRunner, mode: BatchMode, workload: list[Request]) -> Answers:
    """The engine's loop: claim what there is room for, plan, step, apply."""
    runner.least_s = 0.0
    allocator = BlockAllocator(runner.num_blocks, runner.block_size)
    planner = StepPlanner(mode, SLOTS, STEP_TOKENS, allocator, runner.max_model_len, time.monotonic)
    sequences = [
        Sequence(
            id=str(i), attempt=1, tenant="bench", priority=3, arrival_s=0.0, tokens=list(request.prompt),
            num_prompt_tokens=len(request.prompt), max_tokens=request.num_tokens, sampling=GREEDY,
        )
        for i, request in enumerate(workload)
    ]  # fmt: skip
    waiting = list(reversed(sequences))
    unfinished = len(sequences)
    while unfinished:
        for _ in range(min(planner.room().requests, len(waiting))):
            planner.add(waiting.pop())
        parts = planner.plan(time.monotonic())
        for output in planner.apply(parts, runner.step(parts)) if parts else []:
            if output.error:
                raise RuntimeError(output.error)
            unfinished -= output.finish is not None
    return [s.tokens[s.num_prompt_tokens :] for s in sequences]


@torch.inference_mode()
def run_generate(model: Any, workload: list[Request]) -> Answers:
    """transformers' `generate` in batches of 16, padded on the left; a batch runs until its longest answer is done."""
    answers: Answers = []
    for at in range(0, len(workload), SLOTS):
        batch = workload[at : at + SLOTS]
        longest = max(len(r.prompt) for r in batch)
        padded = [[0] * (longest - len(r.prompt)) + r.prompt for r in batch]
        mask = [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in batch]
        out = model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=max(r.num_tokens for r in batch),
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        answers += [row[longest : longest + r.num_tokens].tolist() for row, r in zip(out, batch, strict=True)]
    return answers


def run_transformers_continuous(model: Any, workload: list[Request]) -> Answers:
    """transformers' own continuous batching, with as many slots and as large a step."""
    settings = transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=SLOTS * MAX_MODEL_LEN // 32, max_batch_tokens=STEP_TOKENS,
        max_requests_per_batch=SLOTS, allow_block_sharing=False,
    )  # fmt: skip
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=256)
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, timeout=5
    ) as manager:
        for i, request in enumerate(workload):
            manager.add_request(request.prompt, request_id=str(i), max_new_tokens=request.num_tokens)
        while len(found) < len(workload):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before its end.")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                found[result.request_id] = list(result.generated_tokens)
    return [found[str(i)] for i in range(len(workload))]


def make_systems(path: Path, size: str) -> tuple[dict[str, Callable[[list[Request]], Answers]], MeteredRunner]:
    """What is compared, by name, all with torch's number of threads; and the runner of our own modes."""
    spec = DeploymentSpec(name="bench", path=str(path), dtype="float32", max_batch_size=SLOTS, step_tokens=STEP_TOKENS)
    work = Work.of(SIZES[size])
    rates = measure_rates(work)
    model = ModelRunner(spec, "cpu", num_threads=torch.get_num_threads())
    runner = MeteredRunner(model, work, rates)
    print(f"  {model.describe()}")
    print(f"  one thread: {rates.flops_per_s / 1e9:.0f} GFLOP/s, {rates.bytes_per_s / 1e9:.1f} GB/s")
    systems: dict[str, Callable[[list[Request]], Answers]] = {
        mode: partial(run_ours, runner, mode) for mode in get_args(BatchMode)
    }
    models = [transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2)]
    systems["transformers static"] = partial(run_generate, models[0])
    systems["transformers continuous"] = partial(run_transformers_continuous, models[1])
    return systems, runner


def measure(size: str, rounds: int, num_requests: int) -> dict[str, Any]:
    """Run every system `rounds` times in turn; tokens/s and processor seconds, and whether the answers agree."""
    print(f"{size}:")
    workload = make_workload(num_requests, SIZES[size]["vocab_size"])
    num_tokens = sum(r.num_tokens for r in workload)
    with tempfile.TemporaryDirectory() as folder:
        systems, runner = make_systems(make_checkpoint(size, Path(folder)), size)
        rates: dict[str, list[float]] = {name: [] for name in systems}
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        least: dict[str, float] = {}
        same: dict[str, int] = {}
        expected: Answers = []
        for run in systems.values():
            run([Request(r.prompt[:32], 4) for r in workload[:2]])
        for number in range(rounds):
            for name, run in systems.items():
                start, used = time.perf_counter(), time.process_time()
                answers = run(workload)
                seconds[name].append(time.process_time() - used)
                rates[name].append(num_tokens / (time.perf_counter() - start))
                expected = expected or answers
                print(f"  round {number + 1}: {name} {rates[name][-1]:.1f} tokens/s", flush=True)
                same[name] = sum(a == b for a, b in zip(answers, expected, strict=True))
                if name in get_args(BatchMode):
                    least[name] = runner.least_s
    return {
        "requests": num_requests, "prompt_tokens": sum(len(r.prompt) for r in workload), "output_tokens": num_tokens,
        "tokens_per_s": rates, "cpu_s": seconds, "least_cpu_s": least, "same_answers": same,
    }  # fmt: skip


def report(result: dict[str, Any]) -> dict[str, float]:
    """Print a size's table; returns the ratios of medians."""
    medians = {name: statistics.median(rates) for name, rates in result["tokens_per_s"].items()}
    least = result["least_cpu_s"]
    used = {name: min(seconds) for name, seconds in result["cpu_s"].items()}
    print(
        f"  {result['requests']} requests, {result['prompt_tokens']} prompt tokens, "
        f"{result['output_tokens']} output tokens, {SLOTS} slots"
    )
    print(f"  {'':<26}{'tokens/s':>10}{'min':>9}{'max':>9}{'CPU s':>9}{'of limit':>10}  same answers as serial")
    for name, rates in result["tokens_per_s"].items():
        agree = f"{result['same_answers'][name]}/{result['requests']}"
        share = f"{least[name] / used[name]:.0%}" if name in least else ""
        spread = f"{medians[name]:>10.1f}{min(rates):>9.1f}{max(rates):>9.1f}"
        print(f"  {name:<26}{spread}{used[name]:>9.2f}{share:>10}  {agree}")
    ratios = {name: medians["continuous"] / rate for name, rate in medians.items() if name != "continuous"}
    _print_ratios("tokens/s", ratios)
    _print_ratios("CPU", {name: used[name] / used["continuous"] for name in ratios})
    _print_ratios("at the limit", {name: least[name] / least["continuous"] for name in least if name != "continuous"})
    return ratios


def _print_ratios(what: str, ratios: dict[str, float]) -> None:
    print(f"  continuous, {what}: " + ", ".join(f"{ratio:.2f} x {name}" for name, ratio in ratios.items()))


def main() -> None:
    """Parse options, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="demo,100m", help="comma-separated: " + ", ".join(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every system compared")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if unknown := set(sizes) - SIZES.keys():
        parser.error(f"unknown size {unknown.pop()}; there are {', '.join(SIZES)}")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    machine = {
        "processor": processor_name(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results = {}
    for size in sizes:
        results[size] = measure(size, options.rounds, options.requests)
        results[size]["continuous_over"] = report(results[size])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def processor_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
