"""Runs steps: one forward pass over a mixed batch, tokens out."""

import logging
import math
import time
from collections.abc import Sequence as Seq

import torch

from inference.engine.assembly import assemble
from inference.engine.batch import build_batch, check_part
from inference.engine.errors import DeviceLost, InvalidPart, OutOfDeviceMemory
from inference.engine.kv_cache import BLOCK_SIZE
from inference.engine.sampler import Ask, Choice, Sampler
from inference.messages import DeploymentSpec
from scheduling.core.sequence import PartResult, StepPart

logger = logging.getLogger(__name__)

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
    ) -> None:
        """Load the checkpoint. Raises ModelLoadError or CheckpointError with a sentence that says what to do.

        `num_threads`: CPU threads of a forward pass, by default all physical cores. `native=False` does without
        compiled kernels, `fused=False` without the Llama family's own forward pass.
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
        self.swap_bytes_per_s = self._measure_swap()

    def describe(self) -> str:
        """What was chosen at load, and why."""
        return self._description

    def step(self, parts: Seq[StepPart]) -> list[PartResult]:
        """One forward pass over all parts; writes their keys and values, samples where a part samples.

        Does not change the sequences. A part that fails gets its error and the others their tokens. Raises
        OutOfDeviceMemory (plan less and try again) and DeviceLost.
        """
        results: list[PartResult] = [PartResult()] * len(parts)
        valid = []
        for i, part in enumerate(parts):
            try:
                check_part(
                    part,
                    vocab_size=self.vocab_size,
                    max_model_len=self.max_model_len,
                    num_blocks=self.num_blocks,
                    block_size=self.block_size,
                )
                valid.append(i)
            except InvalidPart as error:
                results[i] = PartResult(error=str(error))
        if valid:
            for i, result in zip(valid, self._run([parts[i] for i in valid]), strict=True):
                results[i] = result
        return results

    def _run(self, parts: Seq[StepPart]) -> list[PartResult]:
        """Run parts together; where that fails, each half by itself, down to the part that is to blame."""
        try:
            return self._run_batch(parts)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory from error
        except torch.AcceleratorError as error:
            raise DeviceLost from error
        except Exception as error:
            if len(parts) == 1:
                logger.exception("Request %s failed in the forward pass", parts[0].sequence.id)
                return [PartResult(error=f"The forward pass failed ({type(error).__name__}).")]
        half = len(parts) // 2
        return self._run(parts[:half]) + self._run(parts[half:])

    @torch.inference_mode()
    def _run_batch(self, parts: Seq[StepPart]) -> list[PartResult]:
        batch = build_batch(parts, self.block_size)
        logits = self._forward(batch)
        results = [PartResult()] * len(parts)
        if not batch.sample_parts:
            return results
        asks = [Ask(parts[i].sequence, parts[i].draft) for i in batch.sample_parts]
        for i, choices in zip(batch.sample_parts, self._sampler.sample(logits, asks), strict=True):
            results[i] = _result(choices)
        return results

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


def _result(choices: list[Choice]) -> PartResult:
    """A part's tokens; one that failed after others counts in the next step, where it fails again."""
    if choices[0].error is not None:
        return PartResult(error=choices[0].error)
    good = [choice for choice in choices if choice.error is None]
    tokens = tuple(choice.token_id for choice in good)
    logprobs = tuple(choice.logprob for choice in good if choice.logprob is not None)
    return PartResult(tokens[0], more=tokens[1:], logprobs=logprobs)
