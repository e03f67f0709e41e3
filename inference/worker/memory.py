"""How many sequences the device has memory for: the memory model of the checkpoint, fed with what is measured."""

import logging
from pathlib import Path

from inference.checkpoint import inspect_checkpoint, read_text_config
from inference.messages import Telemetry
from scheduling.core.planner import StepPlanner
from scheduling.core.sizing.memory_model import BatchShape, MemoryModel, ModelConfigError, ModelShape

logger = logging.getLogger(__name__)

USUAL_TOKENS = 512
"""Length of a sequence while none runs."""


def build_memory_model(path: Path, *, dtype: str, block_size: int) -> MemoryModel | None:
    """The model of a checkpoint's memory; None where its configuration does not say enough."""
    num_parameters = inspect_checkpoint(path, needs_tokenizer=False).num_parameters or 0
    try:
        shape = ModelShape.from_config(read_text_config(path), num_parameters=num_parameters, dtype=dtype)
    except ModelConfigError as error:
        logger.warning("Batch sizes are bounded by KV blocks alone: %s", error)
        return None
    return MemoryModel(shape, block_size=block_size)


class DeviceMemory:
    """Bounds batch sizes by memory, and calibrates the model by what this process holds."""

    def __init__(
        self, model: MemoryModel | None, planner: StepPlanner, beside_bytes: int = 0, *, on_gpu: bool = True
    ) -> None:
        """`beside_bytes`: held by this process for another model, whatever the batch."""
        self._model = model
        self._source = "nvml" if on_gpu else "host"
        """Of the readings that tell of this device's memory."""
        self._beside_bytes = beside_bytes
        self._planner = planner

    def limit(self, telemetry: Telemetry | None) -> int | None:
        """The most sequences that fit, at least 1; None where that is unknown."""
        if self._model is None or telemetry is None or telemetry.stale_s or telemetry.lost:
            return None
        if telemetry.source != self._source:
            return None
        total, used, own = telemetry.memory_total_bytes, telemetry.memory_used_bytes, telemetry.process_memory_bytes
        if total is None or used is None:
            return None
        # In a container NVML knows its processes by other numbers; what all of them hold then counts as ours.
        own = max(0, (used if own is None else own) - self._beside_bytes)
        self._calibrate(own)
        ours = max(0, total - used) + own
        most = self._model.largest_batch(
            ours, tokens_per_sequence=self._mean_tokens(), step_tokens=self._planner.step_tokens
        )
        return max(1, most)

    def _calibrate(self, own_bytes: int) -> None:
        """Learn from the memory that this process holds beside the blocks of the KV cache that the batch does not use.

        All blocks are resident, on a CPU too: the cache is written when it is made.
        """
        assert self._model is not None
        num_running = self._planner.num_running
        if not num_running:
            return
        batch = BatchShape(
            batch_size=num_running, tokens_per_sequence=self._mean_tokens(), step_tokens=self._planner.step_tokens
        )
        in_batch = num_running * self._model.blocks_for(batch.tokens_per_sequence)
        beside = self._planner.allocator.num_blocks - in_batch
        self._model.observe(batch, max(0, own_bytes - beside * self._model.block_bytes))

    def _mean_tokens(self) -> int:
        running = self._planner.sequences[: self._planner.num_running]
        return max(1, sum(len(s.tokens) for s in running) // len(running)) if running else USUAL_TOKENS
