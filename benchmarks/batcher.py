"""The in-process batcher on a real small model: one call after another against batches of 1, 2, 4, 8 and 16.

    python -m benchmarks.batcher [--size demo] [--requests 128] [--rounds 3] [--json FILE]

A request is one next-token prediction for a prompt of 64 tokens (float32, random weights). Serial calls the model once
for each; the others submit the same requests to a batcher that calls it once for each batch. Rounds are interleaved;
medians with the smallest and largest, by processor time, since what else the machine does counts little in it; and what
the batcher itself costs: requests/s through a function that answers at once.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.modes import SIZES, make_checkpoint, processor_name
from scheduling.core.batching.batcher import Batcher
from scheduling.core.simulation.table import format_table

SIZES_OF_BATCH = (1, 2, 4, 8, 16)
PROMPT_TOKENS = 64

Prompt = list[int]
Run = Callable[[list[Prompt]], Coroutine[Any, Any, list[int]]]


def make_model(size: str, folder: Path) -> Callable[[Sequence[Prompt]], list[int]]:
    """A function from a batch of prompts to their next tokens."""
    path = make_checkpoint(size, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def predict(prompts: Sequence[Prompt]) -> list[int]:
        tokens: list[int] = model(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        return tokens

    return predict


def make_systems(predict: Callable[[Sequence[Prompt]], list[int]]) -> dict[str, Run]:
    """Serial, and a batcher for each batch size."""

    async def serial(prompts: list[Prompt]) -> list[int]:
        return [(await asyncio.to_thread(predict, [prompt]))[0] for prompt in prompts]

    async def run_batch(prompts: Sequence[Prompt]) -> Sequence[int | BaseException]:
        return await asyncio.to_thread(predict, prompts)

    def batched(size: int) -> Run:
        async def run(prompts: list[Prompt]) -> list[int]:
            async with Batcher.for_batches(run_batch, size=size) as batcher:
                return await asyncio.gather(*(batcher.submit(prompt) for prompt in prompts))

        return run

    return {"serial": serial, **{f"batches of {size}": batched(size) for size in SIZES_OF_BATCH}}


async def overhead(count: int = 20_000) -> float:
    """Requests a second through the batcher with a function that answers at once."""

    async def answer(items: Sequence[int]) -> Sequence[int | BaseException]:
        return list(items)

    started = time.process_time()
    async with Batcher.for_batches(answer, size=8, max_waiting=count) as batcher:
        await asyncio.gather(*(batcher.submit(i) for i in range(count)))
    return count / (time.process_time() - started)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"{processor_name()}, 1 thread, torch {torch.__version__}, {options.requests} requests")
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(options.requests)]
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        systems = make_systems(make_model(options.size, Path(folder)))
        expected = asyncio.run(systems["serial"](prompts))
        for _ in range(options.rounds):
            for name, run in systems.items():
                started = time.process_time()
                answers = asyncio.run(run(prompts))
                rates.setdefault(name, []).append(len(prompts) / (time.process_time() - started))
                assert sum(a == b for a, b in zip(answers, expected, strict=True)) >= 0.99 * len(prompts), name
    serial = statistics.median(rates["serial"])
    rows = [
        [name, f"{statistics.median(r):.1f}", f"{min(r):.1f} - {max(r):.1f}", f"{statistics.median(r) / serial:.2f}"]
        for name, r in rates.items()
    ]
    print(format_table(["", "requests/s", "spread", "times serial"], rows))
    alone = statistics.median(asyncio.run(overhead()) for _ in range(options.rounds))
    print(f"The batcher itself, with a function that answers at once: {alone:,.0f} requests/s")
    if options.json:
        options.json.write_text(json.dumps({"requests_per_s": rates, "batcher_requests_per_s": alone}, indent=2) + "\n")


if __name__ == "__main__":
    main()
