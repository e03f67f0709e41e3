"""Runs steps: one forward pass over a mixed batch, tokens out."""

import logging
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from inference.checkpoint import inspect_checkpoint
from inference.engine import loading
from inference.engine.attention import PagedContext
from inference.engine.batch import StepBatch, build_batch, check_part
from inference.engine.errors import DeviceLost, InvalidPart, ModelLoadError, OutOfDeviceMemory
from inference.engine.kv_cache import BLOCK_SIZE, KVCache, size_cache
from inference.engine.sampler import NOT_FINITE, sample
from inference.messages import DeploymentSpec
from scheduling.core.sequence import PartResult, StepPart

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """A loaded model with its KV cache on one device."""

    def __init__(
        self,
        spec: DeploymentSpec,
        device: str = "auto",
        *,
        num_blocks: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Load the checkpoint. Raises ModelLoadError or CheckpointError with a sentence that says what to do."""
        if num_threads:
            torch.set_num_threads(num_threads)
        path = Path(spec.path)
        info = inspect_checkpoint(path, needs_tokenizer=False)
        self.device = _choose_device(device)
        self.dtype = _choose_dtype(spec.dtype, self.device)
        config = loading.load_config(path)
        self.max_model_len = loading.longest_sequence(config, spec.max_model_len)
        shape = loading.kv_shape(config, self.dtype)
        self._model = loading.load_model(path, config, self.dtype, self.device)
        loading.verify_attention(self._model, config, shape, self.device)
        self.vocab_size = int(config.get_text_config().vocab_size)
        self.eos_token_ids = info.eos_token_ids
        self.block_size = BLOCK_SIZE
        size = size_cache(
            shape, self.device, max_batch_size=spec.max_batch_size, max_model_len=self.max_model_len,
            requested_bytes=spec.kv_memory_bytes,
        ) if num_blocks is None else None  # fmt: skip
        self.num_blocks = size.num_blocks if size else num_blocks or 0
        self._cache = KVCache(shape, self.num_blocks, self.device)
        self._why = size.reason if size else "as asked"
        self._block_bytes = shape.block_bytes
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def describe(self) -> str:
        """What was chosen at load, and why."""
        gib = self.num_blocks * self._block_bytes / 2**30
        return (
            f"{type(self._model).__name__} in {str(self.dtype).removeprefix('torch.')} on {self.device_name}; KV cache of "
            f"{self.num_blocks} blocks of {self.block_size} tokens, {gib:.2f} GiB ({self._why})"
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
                    part, vocab_size=self.vocab_size, max_model_len=self.max_model_len, block_size=self.block_size
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
            return self._forward(parts)
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
    def _forward(self, parts: Seq[StepPart]) -> list[PartResult]:
        batch = build_batch(parts, self.block_size)
        logits = self._logits(batch)
        sampled = [parts[i].sequence for i in batch.sample_parts]
        tokens = sample(logits, [s.sampling for s in sampled], [len(s.tokens) for s in sampled]) if sampled else []
        results = [PartResult()] * len(parts)
        for i, token in zip(batch.sample_parts, tokens, strict=True):
            results[i] = PartResult(error=NOT_FINITE) if token is None else PartResult(token_id=token)
        return results

    def _logits(self, batch: StepBatch) -> torch.Tensor:
        """[N, vocab] in float32, one row per part that samples."""
        context = PagedContext(batch, self._cache, self.device)
        rows = torch.from_numpy(batch.sample_rows).to(self.device)
        return loading.forward(self._model, batch.token_ids, batch.positions, context, rows)[0].float()


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError(
            "There is no CUDA device here. Set PENSTOCK_DEVICE to cpu or auto, or install a CUDA build of torch."
        )
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(f"There is no device {name}; this host has {torch.cuda.device_count()}.")
    return device


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
