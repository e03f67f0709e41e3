"""What weights in fewer bits cost and bring: logits, perplexity, memory, steps; each beside float32 in the same run."""

import math
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.modes import Request, make_sequence
from inference.demo.corpus import conversation
from inference.engine.batch import build_batch
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from inference.tokenization import Tokenizer
from scheduling.core.sequence import StepPart

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
}
HELD_OUT_SEED = 977
DOCUMENTS = 60


def measure_speed(path: Path, size: str) -> dict[str, Any]:
    """Milliseconds of decode steps of 1 and 16 sequences at context 160, and of 256 prompt tokens; the shortest."""
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        runner = ModelRunner(DeploymentSpec(name="bench", path=str(path), **settings), "cpu", num_blocks=400)
        row = {
            "one_ms": _step_ms(runner, 1, 160, 1),
            "sixteen_ms": _step_ms(runner, 16, 160, 1),
            "prompt_ms": _step_ms(runner, 1, 256, 256),
        }
        found[name] = row
        print(
            f"  {name:<9} step of 1: {row['one_ms']:.2f} ms, of 16: {row['sixteen_ms']:.2f} ms, 256 prompt tokens: "
            f"{row['prompt_ms']:.1f} ms; {runner.describe().split(';')[0]}"
        )
    return found


def _step_ms(runner: ModelRunner, batch: int, context: int, count: int) -> float:
    blocks, parts = context // runner.block_size, []
    for i in range(batch):
        sequence = make_sequence(i, Request([5 + i] * context, 1))
        sequence.num_computed = context - count
        sequence.block_table = list(range(i * blocks, (i + 1) * blocks))
        parts.append(StepPart(sequence, count, samples=True))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        runner.step(parts)
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def measure_quality(checkpoint: Path) -> dict[str, Any]:
    """Perplexity on conversations that the demo model has not learnt, and how far logits are off."""
    tokenizer = Tokenizer.load(checkpoint)
    rng = Random(HELD_OUT_SEED)
    texts = ["\n".join(message["content"] for message in conversation(rng)) for _ in range(DOCUMENTS)]
    documents = [tokenizer.encode(text)[:256] for text in texts]
    exact: list[torch.Tensor] = []
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        runner = ModelRunner(DeploymentSpec(name="demo", path=str(checkpoint), **settings), "cpu", num_blocks=32)
        logits = [_logits(runner, document) for document in documents]
        exact = exact or logits
        errors = [(a - b).square().mean() / b.var() for a, b in zip(logits, exact, strict=True)]
        agree = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(logits, exact, strict=True)]).float().mean()
        found[name] = {
            "perplexity": _perplexity(logits, documents),
            "logit_error": math.sqrt(float(torch.stack(errors).mean())),
            "same_likeliest": float(agree),
        }
        row = found[name]
        delta = row["perplexity"] / found["float32"]["perplexity"] - 1
        print(
            f"  {name:<9} perplexity {row['perplexity']:.4f} ({delta:+.3%}), logits off by {row['logit_error']:.2%} of "
            f"their spread, same likeliest token at {row['same_likeliest']:.2%} of places"
        )
    return found


@torch.inference_mode()
def _logits(runner: ModelRunner, tokens: list[int]) -> torch.Tensor:
    sequence = make_sequence(0, Request(tokens, 1))
    sequence.block_table = list(range(-(-len(tokens) // runner.block_size)))
    batch = build_batch([StepPart(sequence, len(tokens), samples=True)], runner.block_size)
    batch.sample_rows = np.arange(len(tokens))
    return runner._forward(batch).float().clone()


def _perplexity(logits: list[torch.Tensor], documents: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(found[:-1], torch.tensor(document[1:]), reduction="none")
        for found, document in zip(logits, documents, strict=True)
    ]
    return math.exp(float(torch.cat(losses).mean()))
