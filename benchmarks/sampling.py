"""What choosing tokens costs beside the forward pass, and what guessing them ahead brings; ratios of one process.

Run as `python -m benchmarks.sampling [--size demo|100m] [--json FILE]`. Texts that repeat are made by a bias of their
logits: with one likely token every guess is right, with three equally likely ones about a third of the first guesses.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.modes import SIZES, make_checkpoint
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import SamplingParams, Sequence
from scheduling.core.speculation import Speculation

SLOTS = 16
PROMPT_TOKENS = 64
STEPS = 25
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9, min_p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "greedy, three penalties": {
        "temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
    },
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
}  # fmt: skip
TEXTS = {"every guess right": 1, "a third right": 3}
"""Number of tokens that are likely."""


class Clock:
    """Wraps a call and keeps the time of each."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.times_s: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        """Pass on, and note the time."""
        started = time.perf_counter()
        answer = self._call(*arguments)
        self.times_s.append(time.perf_counter() - started)
        return answer


def make_batch(size: int, num_tokens: int, vocab_size: int, **options: Any) -> list[Sequence]:
    """Sequences of random prompts, each with its own seed."""
    generator = torch.Generator().manual_seed(7)
    return [
        Sequence(
            id=str(i), attempt=1, tenant="t", priority=3, arrival_s=0.0, max_tokens=num_tokens,
            tokens=torch.randint(3, vocab_size, (PROMPT_TOKENS,), generator=generator).tolist(),
            num_prompt_tokens=PROMPT_TOKENS, sampling=SamplingParams(seed=i, ignore_eos=True, **options),
        )
        for i in range(size)
    ]  # fmt: skip


def run(runner: ModelRunner, sequences: list[Sequence], speculation: Speculation | None = None) -> float:
    """Serve a batch to its end; seconds of its decode steps."""
    planner = StepPlanner(
        "continuous", len(sequences), 2048, BlockAllocator(runner.num_blocks, runner.block_size), runner.max_model_len,
        time.monotonic, drafter=speculation,
    )  # fmt: skip
    for sequence in sequences:
        planner.add(sequence)
    total_s = 0.0
    while planner.sequences:
        parts = planner.plan(time.monotonic())
        started = time.perf_counter()
        results = runner.step(parts)
        seconds = time.perf_counter() - started
        if speculation:
            seconds += speculation.spent_s
            speculation.observe(parts, results, seconds)
        planner.apply(parts, results)
        if not any(part.sequence.num_output_tokens <= 1 for part in parts):
            total_s += seconds
    return total_s


def measure_shares(runner: ModelRunner) -> dict[str, dict[str, float]]:
    """Median milliseconds of a decode step of 16, and of its sampling."""
    launch, shares = runner._sampler.launch, {}
    for name, options in OPTIONS.items():
        runner._sampler.launch = chosen = Clock(launch)  # type: ignore[assignment,method-assign]
        step = Clock(runner.step)
        runner.step = step  # type: ignore[assignment,method-assign]
        run(runner, make_batch(SLOTS, STEPS, runner.vocab_size, **options))
        del runner.step, runner._sampler.launch
        step_ms, sample_ms = (1000 * median(clock.times_s[5:]) for clock in (step, chosen))
        shares[name] = {"step_ms": step_ms, "sampling_ms": sample_ms, "percent": 100 * sample_ms / step_ms}
        print(f"{name:34s} step {step_ms:7.2f} ms, sampling {sample_ms:6.2f} ms, {shares[name]['percent']:5.1f} %")
    return shares


def measure_speculation(runner: ModelRunner, num_tokens: int) -> list[dict[str, Any]]:
    """Decode time without drafts over that with them, for sizes of batch and kinds of text."""
    rows = []
    for text, count in TEXTS.items():
        bias = tuple((token, 60.0) for token in range(100, 100 + count))
        for size in (1, 4, SLOTS):
            plain, guessed = (make_batch(size, num_tokens, runner.vocab_size, logit_bias=bias) for _ in range(2))
            speculation = Speculation(4)
            plain_s, guessed_s = run(runner, plain), run(runner, guessed, speculation)
            assert [s.tokens for s in plain] == [s.tokens for s in guessed], "drafts changed a text"
            accepted = 100 * speculation.num_accepted / max(1, speculation.num_drafted)
            rows.append({"text": text, "batch": size, "speedup": plain_s / guessed_s, "accepted_percent": accepted})
            state = "on" if speculation.is_on else "off"
            print(
                f"{text:20s} batch {size:2d}: {plain_s / guessed_s:4.2f} times as fast; "
                f"{speculation.num_drafted} guesses, {accepted:.0f} % right, in the end {state}"
            )
    return rows


def main() -> None:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--tokens", type=int, default=80, help="tokens of each answer that is guessed ahead")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(arguments.size, Path(folder))
        runner = ModelRunner(DeploymentSpec(name="m", path=str(path)))
    print(runner.describe())
    versions = f"{platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(versions)
    measured = {
        "size": arguments.size,
        "machine": versions,
        "sampling": measure_shares(runner),
        "speculation": measure_speculation(runner, arguments.tokens),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
