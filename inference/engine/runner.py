"""Runs steps: one forward pass over a mixed batch, tokens out."""

import ctypes
import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from transformers import PreTrainedModel

from inference.checkpoint import inspect_checkpoint
from inference.engine import llama, loading
from inference.engine.batch import StepBatch, build_batch, check_part
from inference.engine.errors import DeviceLost, InvalidPart, ModelLoadError, OutOfDeviceMemory
from inference.engine.kv_cache import BLOCK_SIZE, KVCache, KVShape, size_cache
from inference.engine.llama import LlamaForward
from inference.engine.modules import ModulesForward
from inference.engine.native import load_kernels
from inference.engine.sampler import Ask, Choice, Sampler
from inference.messages import DeploymentSpec
from scheduling.core.sequence import PartResult, StepPart

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_TOKENS = 24


class ModelRunner:
    """A loaded model with its KV cache on one device.

    `max_model_len` and `num_blocks` times `block_size` bound what its sequences may hold, in tokens.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        device: str = "auto",
        *,
        num_blocks: int | None = None,
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
        path = Path(spec.path)
        info = inspect_checkpoint(path, needs_tokenizer=False)
        self.device = _choose_device(device)
        self.dtype = _choose_dtype(spec.dtype, self.device)
        config = loading.load_config(path)
        self.max_model_len = loading.longest_sequence(config, spec.max_model_len)
        self.vocab_size = int(config.get_text_config().vocab_size)
        self.eos_token_ids = info.eos_token_ids
        self._sampler = Sampler(info.eos_token_ids)
        self.block_size = BLOCK_SIZE
        model = loading.load_model(path, config, self.dtype, self.device)
        self._make_cache(spec, loading.kv_shape(config, self.dtype), num_blocks)
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        kernels = load_kernels() if native and self.device.type == "cpu" and self.dtype == torch.float32 else None
        if kernels is not None:
            kernels.set_threads(torch.get_num_threads())
        self._forward = self._build_forward(model, kernels, fused)
        self._name = type(model).__name__

    def describe(self) -> str:
        """What was chosen at load, and why."""
        dtype = str(self.dtype).removeprefix("torch.")
        mib = self.num_blocks * self._cache.shape.block_bytes / 2**20
        return (
            f"{self._name} in {dtype} on {self.device_name}, {self._how}; KV cache of {self.num_blocks} blocks of "
            f"{self.block_size} tokens, {mib:.0f} MiB: {self._why}"
        )

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

    def _make_cache(self, spec: DeploymentSpec, shape: KVShape, num_blocks: int | None) -> None:
        self._why = "as asked for"
        if num_blocks is None:
            size = size_cache(
                shape,
                self.device,
                max_batch_size=spec.max_batch_size,
                max_model_len=self.max_model_len,
                requested_bytes=spec.kv_memory_bytes,
            )
            num_blocks, self._why = size.num_blocks, size.reason
        self.num_blocks = num_blocks
        self._cache = KVCache(shape, num_blocks, self.device)
        self.num_host_blocks = self._cache.num_host_blocks

    def _build_forward(
        self, model: PreTrainedModel, kernels: ctypes.CDLL | None, fused: bool
    ) -> Callable[[StepBatch], torch.Tensor]:
        """Choose the forward pass, and hold it against the model's own before anything is served."""
        tokens = min(PROBE_TOKENS, self.max_model_len, self.num_blocks * self.block_size)
        forward: Callable[[StepBatch], torch.Tensor]
        try:
            expected = loading.reference_logits(model, self.vocab_size, tokens, self.device)
            with torch.inference_mode():
                if kernels is not None and fused and llama.supports(model):
                    forward = LlamaForward(kernels, model, self._cache, self.max_model_len)
                    self._how = "fused and compiled"
                else:
                    forward = ModulesForward(kernels, model, self._cache, self.device)
                    self._how = "transformers' modules" + (
                        " with compiled attention and linear layers" if kernels else ""
                    )
            loading.verify(forward, expected, self.dtype)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory from error
        except Exception as error:
            raise ModelLoadError(f"{type(model).__name__} cannot be served by this engine: {error}") from error
        return forward


def _result(choices: list[Choice]) -> PartResult:
    """A part's tokens; one that failed after others counts in the next step, where it fails again."""
    if choices[0].error is not None:
        return PartResult(error=choices[0].error)
    good = [choice for choice in choices if choice.error is None]
    tokens = tuple(choice.token_id for choice in good)
    logprobs = tuple(choice.logprob for choice in good if choice.logprob is not None)
    return PartResult(tokens[0], more=tokens[1:], logprobs=logprobs)


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError("There is no CUDA device here. Set PENSTOCK_DEVICE to cpu or auto.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(f"There is no device {name}; this host has {torch.cuda.device_count()}.")
    return device


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
