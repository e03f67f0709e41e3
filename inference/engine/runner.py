"""Runs steps: one forward pass over a mixed batch, tokens out."""

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch

from inference.engine.assembly import assemble
from inference.engine.batch import StepBatch, build_batch, check_part, foresee_batch
from inference.engine.errors import DeviceLost, InvalidPart, OutOfDeviceMemory
from inference.engine.kv_cache import BLOCK_SIZE
from inference.engine.memory import is_out_of_memory
from inference.engine.sampler import Ask, Choice, Chosen, Sampler
from inference.messages import DeploymentSpec
from scheduling.core.sequence import PartResult, Sequence, StepPart

logger = logging.getLogger(__name__)

Results = Callable[[], list[PartResult]]
"""Waits for what a step gave its parts."""
PROBE_BLOCKS = 64
"""KV blocks that are moved to see how fast the way to host memory is."""


class ModelRunner:
    """A loaded model with its KV cache on one device.

    `max_model_len` and `num_blocks` times `block_size` bound what its sequences may hold, in tokens. `num_host_blocks`
    have room in host memory besides; a block has `block_bytes`, of which `swap_bytes_per_s` move there and back.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        device: str = "auto",
        *,
        num_blocks: int | None = None,
        num_host_blocks: int | None = None,
        num_threads: int | None = None,
        native: bool = True,
        fused: bool = True,
        runs_ahead: bool | None = None,
    ) -> None:
        """Load the checkpoint. Raises ModelLoadError or CheckpointError with a sentence that says what to do.

        `num_threads`: CPU threads of a forward pass, by default all physical cores. `native=False` does without
        compiled kernels, `fused=False` without the Llama family's own forward pass. `runs_ahead`: `start` computes,
        rather than the call it returns; by default on CUDA, where computing is only begun.
        """
        if num_threads:
            torch.set_num_threads(num_threads)
        assembly = assemble(
            spec, device, num_blocks=num_blocks, num_host_blocks=num_host_blocks, native=native, fused=fused
        )
        self.device, self.dtype = assembly.device, assembly.dtype
        self.max_model_len, self.vocab_size = assembly.max_model_len, assembly.vocab_size
        self.eos_token_ids = assembly.eos_token_ids
        self.num_blocks, self.block_size = assembly.cache.num_blocks, BLOCK_SIZE
        self.num_host_blocks, self.block_bytes = assembly.cache.num_host_blocks, assembly.cache.shape.block_bytes
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        # Configurations name ids, of a tokenizer's added tokens, that the model has no logit for.
        self._sampler = Sampler(frozenset(i for i in self.eos_token_ids if i < self.vocab_size))
        self._cache, self._forward, self._description = assembly.cache, assembly.forward, assembly.description
        self._prepare, self._extend = assembly.prepare, assembly.extend
        self._most_captured = 0
        self.runs_ahead = self.device.type == "cuda" if runs_ahead is None else runs_ahead
        self.num_foreseen = 0
        """Steps that began as they were foreseen."""
        self._foreseen: Foreseen | None = None
        self.swap_bytes_per_s = self._measure_swap()

    def describe(self) -> str:
        """What was chosen at load, and why, and what became ready since."""
        if not self._most_captured:
            return self._description
        return f"{self._description}; since then decode steps of up to {self._most_captured} sequences"

    @torch.inference_mode()
    def make_ready(self, batch_size: int) -> bool:
        """Capture a size of decode steps that batches of up to so many sequences lack; whether one is new.

        One a call, the largest first, which takes about as long as a few steps. Not while a step runs.
        """
        size = self._extend(batch_size) if self._extend is not None else None
        self._most_captured = max(self._most_captured, size or 0)
        return size is not None

    def step(self, parts: Seq[StepPart]) -> list[PartResult]:
        """One forward pass over all parts; writes their keys and values, samples where a part samples.

        Does not change the sequences. A part that fails gets its error and the others their tokens. Raises
        OutOfDeviceMemory (plan less and try again) and DeviceLost.
        """
        return self.start(parts)()

    def start(self, parts: Seq[StepPart]) -> Results:
        """Begin a step; the call that is returned gives what `step` does, once.

        All that is read of the sequences is read now, so that they may change or lose their blocks meanwhile; nobody
        else may be given those before the end. Where the runner `runs_ahead` the device computes from now on.
        """
        errors: list[PartResult | None] = []
        good = []
        for part in parts:
            try:
                check_part(
                    part,
                    vocab_size=self.vocab_size,
                    max_model_len=self.max_model_len,
                    num_blocks=self.num_blocks,
                    block_size=self.block_size,
                )
                good.append(part)
                errors.append(None)
            except InvalidPart as error:
                errors.append(PartResult(error=str(error)))
        compute = self._begin(good) if good else list

        def wait() -> list[PartResult]:
            found = iter(self._finish(good, compute))
            return [error or next(found) for error in errors]

        return wait

    @torch.inference_mode()
    def foresee(self, sequences: Seq[Sequence]) -> None:
        """Lay out, while a step runs, the one that follows if these get a token each in it and nobody else takes part.

        A step that begins otherwise is laid out when it begins.
        """
        self._foreseen = None
        if sequences:
            batch = foresee_batch(sequences, self.block_size)
            self._foreseen = Foreseen(list(sequences), [len(s.block_table) for s in sequences], batch)
            if self._prepare is not None:
                with suppress(torch.OutOfMemoryError):  # then they are sent with the step, which says so if it must
                    self._prepare(batch)

    def _begin(self, parts: Seq[StepPart]) -> Results:
        """Lay parts out and, where the runner runs ahead, launch them."""
        foreseen, self._foreseen = self._foreseen, None
        batch = foreseen.take(parts) if foreseen else None
        if batch is None:
            batch = build_batch(parts, self.block_size)
        else:
            self.num_foreseen += 1
        asks = [Ask(parts[i].sequence, parts[i].draft) for i in batch.sample_parts]
        if not self.runs_ahead:
            return lambda: self._launch(batch, asks)()
        try:
            return self._launch(batch, asks)
        except Exception as error:
            return partial(_fail, error)

    @torch.inference_mode()
    def _launch(self, batch: StepBatch, asks: list[Ask]) -> Results:
        logits = self._forward(batch)
        chosen = self._sampler.launch(logits, asks) if asks else list
        return partial(self._collect, batch, chosen)

    @torch.inference_mode()
    def _collect(self, batch: StepBatch, chosen: Chosen) -> list[PartResult]:
        results = [PartResult()] * len(batch.context_lens)
        for i, choices in zip(batch.sample_parts, chosen(), strict=True):
            results[i] = _result(choices)
        return results

    def _finish(self, parts: Seq[StepPart], compute: Results) -> list[PartResult]:
        """Results of parts together; where that fails, of each half by itself, down to the part that is to blame."""
        try:
            return compute()
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfDeviceMemory from error
            if isinstance(error, torch.AcceleratorError) or self._is_lost():
                raise DeviceLost from error
            if len(parts) == 1:
                logger.exception("Request %s failed in the forward pass", parts[0].sequence.id)
                return [PartResult(error=f"The forward pass failed ({type(error).__name__}).")]
        half = len(parts) // 2
        return self.step(parts[:half]) + self.step(parts[half:])

    def _is_lost(self) -> bool:
        """Whether the device fails at whatever it is asked. Libraries beside torch say so by errors of their own."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except torch.AcceleratorError:
            return True
        return False

    def swap_out(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy (device block, host block) pairs to host memory, of which there are `num_host_blocks` blocks.

        Whoever frees or overwrites a block afterwards needs no wait. Raises IndexError for a block that is not there.
        """
        self._cache.swap_out(pairs)

    def swap_in(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy (host block, device block) pairs back."""
        self._cache.swap_in(pairs)

    def _measure_swap(self) -> float:
        """Bytes a second that move between cache and host memory, by moving blocks that nobody uses yet."""
        num_blocks = min(self.num_blocks, self.num_host_blocks, PROBE_BLOCKS)
        if not num_blocks:
            return 0.0
        pairs = [(block, block) for block in range(num_blocks)]
        best_s = math.inf
        for _ in range(3):
            started = time.perf_counter()
            self.swap_out(pairs)
            self.swap_in(pairs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best_s = min(best_s, time.perf_counter() - started)
        return 2 * num_blocks * self.block_bytes / best_s


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A decode step that was laid out before its tokens were known."""

    sequences: list[Sequence]
    num_blocks: list[int]
    batch: StepBatch

    def take(self, parts: Seq[StepPart]) -> StepBatch | None:
        """The batch with its tokens, if these parts are what was foreseen; else None."""
        positions = self.batch.positions.tolist()
        expected = zip(parts, self.sequences, positions, self.num_blocks, strict=False)
        if len(parts) != len(positions) or not all(
            part.sequence is sequence
            and part.num_tokens == 1
            and part.samples
            and sequence.num_computed == position == len(sequence.tokens) - 1
            and len(sequence.block_table) == num_blocks
            for part, sequence, position, num_blocks in expected
        ):
            return None
        self.batch.token_ids[:] = [sequence.tokens[-1] for sequence in self.sequences]
        return self.batch


def _fail(error: Exception) -> NoReturn:
    raise error


def _result(choices: list[Choice]) -> PartResult:
    """A part's tokens; one that failed after others counts in the next step, where it fails again."""
    if choices[0].error is not None:
        return PartResult(error=choices[0].error)
    good = [choice for choice in choices if choice.error is None]
    tokens = tuple(choice.token_id for choice in good)
    logprobs = tuple(choice.logprob for choice in good if choice.logprob is not None)
    return PartResult(tokens[0], more=tokens[1:], logprobs=logprobs)
