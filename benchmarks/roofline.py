"""The least processor time that a model's steps can take, from rates measured on one thread (Williams et al. 2009).

A step reads every weight once, and the keys and values of its contexts; it multiplies each token with the weights. At
the limit the slower of the two hides the other.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from inference.engine.native import PackedLinear, load_kernels
from inference.engine.runner import ModelRunner
from scheduling.core.sequence import PartResult, StepPart
from scheduling.core.sizing.cost_model import measure_parts

REPEATS = 12


class Rates(NamedTuple):
    """What one thread of this machine reached, the best of several tries and of two implementations."""

    flops_per_s: float
    bytes_per_s: float


class Work(NamedTuple):
    """Sizes of a model of the Llama family, in weights and in numbers."""

    layer_weights: int
    head_weights: int
    layers: int
    heads_dim: int
    kv_dim: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Work":
        """From the arguments of a LlamaConfig."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_dim = config["num_key_value_heads"] * hidden // heads
        layer = hidden * (2 * hidden + 2 * kv_dim) + 3 * hidden * config["intermediate_size"]
        layers = config["num_hidden_layers"]
        return cls(layers * layer, hidden * config["vocab_size"], layers, hidden, kv_dim)

    def least_seconds(self, parts: Sequence[StepPart], rates: Rates, weight_bytes: int = 4) -> float:
        """Of a step over these parts; weights, keys and values take so many bytes each."""
        tokens = sum(part.num_tokens for part in parts)
        rows = sum(part.samples for part in parts)
        ends = [(part.sequence.num_computed + part.num_tokens, part.num_tokens) for part in parts]
        seen = sum(n * end - n * (n - 1) // 2 for end, n in ends)
        flops = 2 * (tokens * self.layer_weights + rows * self.head_weights) + 4 * self.layers * self.heads_dim * seen
        read = self.layer_weights + (self.head_weights if rows else 0)
        cached = 2 * self.layers * self.kv_dim * sum(end for end, _ in ends)
        return max(flops / rates.flops_per_s, weight_bytes * (read + cached) / rates.bytes_per_s)


class StepNote(NamedTuple):
    """A step that was computed."""

    sequences: int
    sampled: int
    prompt_tokens: int
    seconds: float
    cpu_s: float
    """Processor time of all threads."""
    least_s: float


class MeteredRunner:
    """A runner that adds up the least time of the steps it is given, and where their time goes."""

    def __init__(self, runner: ModelRunner, work: Work, rates: Rates, weight_bytes: int = 4) -> None:
        self.runner = runner
        self.num_blocks, self.block_size = runner.num_blocks, runner.block_size
        self.max_model_len = runner.max_model_len
        self._work, self._rates, self._weight_bytes = work, rates, weight_bytes
        runner._forward = self._timed("forward", runner._forward)
        launch = self._timed("sampling", runner._sampler.launch)
        runner._sampler.launch = lambda *given: self._timed("sampling", launch(*given))  # type: ignore[method-assign]
        self.reset()

    def reset(self) -> None:
        """Begin to count."""
        self.elapsed_s = self.turns_s = 0.0
        self.notes: list[StepNote] = []
        self.spent_s = {"forward": 0.0, "sampling": 0.0}

    def step(self, parts: Sequence[StepPart]) -> list[PartResult]:
        """Pass on to the model."""
        return self.start(parts)()

    def start(self, parts: Sequence[StepPart]) -> Callable[[], list[PartResult]]:
        """Pass on to the model; a step lasts from here to its results."""
        least_s = self._work.least_seconds(parts, self._rates, self._weight_bytes)
        prompt_tokens, sampled = measure_parts(parts).prefill_tokens, sum(part.samples for part in parts)
        start, used = time.perf_counter(), time.process_time()
        wait = self.runner.start(parts)

        def timed_wait() -> list[PartResult]:
            results = wait()
            seconds, cpu_s = time.perf_counter() - start, time.process_time() - used
            self.notes.append(StepNote(len(parts), sampled, prompt_tokens, seconds, cpu_s, least_s))
            return results

        return timed_wait

    @property
    def least_s(self) -> float:
        """The least processor time of all steps together."""
        return sum(note.least_s for note in self.notes)

    @property
    def steps_s(self) -> list[float]:
        """How long each step took."""
        return [note.seconds for note in self.notes]

    @property
    def outside(self) -> float:
        """Share of the time since the first request that went neither to the forward pass nor to sampling.

        Without the benchmark's own noting of times, and without waiting for requests.
        """
        elapsed = self.elapsed_s - self.turns_s
        return 1 - sum(self.spent_s.values()) / elapsed if elapsed else 0.0

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = call(*arguments)
            self.spent_s[name] += time.perf_counter() - start
            return found

        return timed


@torch.inference_mode()
def measure_rates(work: Work) -> Rates:
    """Products of 240 rows, and a pass over as many weights as the model has, by torch and by our kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kernels = load_kernels()
    try:
        x, weight = torch.randn(240, 256), torch.randn(512, 256)
        weights = torch.randn((work.layer_weights + work.head_weights) // 1024, 1024)
        compute: list[Callable[[], Any]] = [lambda: torch.nn.functional.linear(x, weight)]
        read: list[Callable[[], Any]] = [lambda: weights.sum()]
        if kernels is not None:
            kernels.set_threads(1)
            small, large = PackedLinear(kernels, weight, None), PackedLinear(kernels, weights, None)
            row = torch.randn(1, 1024)
            compute.append(lambda: small(x))
            read.append(lambda: large(row))
        flops = 2 * x.numel() * len(weight)
        return Rates(flops / min(map(_shortest, compute)), 4 * weights.numel() / min(map(_shortest, read)))
    finally:
        torch.set_num_threads(threads)
        if kernels is not None:
            kernels.set_threads(threads)


def _shortest(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)
