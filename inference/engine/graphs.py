"""Decode steps as CUDA graphs over padded batch sizes; other steps run as they come."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from inference.engine.attention import DecodeKernel, Rule
from inference.engine.batch import StepBatch
from inference.engine.kv_cache import BLOCK_SIZE, KVCache
from inference.engine.modules import ModulesForward

SIZES = (1, 2, 4, 8, *range(16, 257, 16))
"""Sequences of a captured step; one that has fewer is filled up, one with more than the last is not captured."""
WARM_UPS = 2


class DecodeContext:
    """What attention sees of a decode step: tensors that stay where they are while their content changes."""

    def __init__(self, inputs: torch.Tensor, cache: KVCache, attend: DecodeKernel) -> None:
        """`inputs` [sequences, 4 + blocks]: token, position, slot and context length, then the block table."""
        self._cache, self._attend = cache, attend
        self.layers_seen: list[int] = []
        self.token_ids, self.positions, self._slots, self._contexts = inputs[:, :4].unbind(1)
        self._tables = inputs[:, 4:]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        """Write this step's keys and values, and attend; see attention.PagedContext."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        blocks, offsets = self._slots // BLOCK_SIZE, self._slots % BLOCK_SIZE
        keys[blocks, :, :, offsets] = key[0].transpose(0, 1)
        values[blocks, :, offsets] = value[0].transpose(0, 1)
        asked = query[0].transpose(0, 1)
        return self._attend(asked, keys, values, self._tables, self._contexts, rule)


@dataclass(slots=True)
class _Step:
    """Decode steps of one size."""

    staging: list[torch.Tensor]
    """Host memory for the inputs, twice: the latter is filled next, while the former may still be read."""
    tokens: torch.Tensor
    inputs: torch.Tensor
    """On the device, see DecodeContext."""
    run: Callable[[], torch.Tensor]
    """Computes the logits of the inputs."""


class GraphedForward:
    """A forward pass whose decode steps are replayed. `capture=False` runs them without graphs, on any device."""

    def __init__(
        self,
        modules: ModulesForward,
        model: PreTrainedModel,
        cache: KVCache,
        attend: DecodeKernel,
        max_model_len: int,
        *,
        capture: bool,
    ) -> None:
        self._modules, self._model, self._cache, self._attend = modules, model, cache, attend
        self._width = 4 + -(-max_model_len // BLOCK_SIZE)
        self._capture = capture
        self._steps: dict[int, _Step] = {}
        self._prepared: StepBatch | None = None
        """Whose tables are on the device, or on their way there."""
        self._pool: Any = None

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        """Logits [N, vocab] of the batch's sample rows."""
        num_parts = len(batch.context_lens)
        # Nobody waits for a step that samples nothing: the next would overwrite its inputs before they are read.
        if len(batch.token_ids) > num_parts or num_parts > SIZES[-1] or not len(batch.sample_rows):
            return self._modules(batch)
        size = next(size for size in SIZES if size >= num_parts)
        if size not in self._steps:
            self._steps[size] = self._capture_step(size)
        step = self._steps[size]
        if batch is self._prepared:
            step.tokens[:num_parts] = torch.from_numpy(batch.token_ids)
            step.inputs[:num_parts, 0].copy_(step.tokens[:num_parts], non_blocking=True)
        else:
            self._upload(step, batch)
        self._prepared = None
        logits = step.run()[:num_parts]
        if len(batch.sample_rows) == num_parts:
            return logits
        return logits[torch.from_numpy(batch.sample_rows).to(logits.device)]

    def prepare(self, batch: StepBatch) -> None:
        """Send a decode step's tables ahead, behind the step that runs; its tokens come with the call."""
        num_parts = len(batch.context_lens)
        step = next((self._steps.get(size) for size in SIZES if size >= num_parts), None)
        self._prepared = batch if step is not None else None
        if step is not None:
            self._upload(step, batch)

    def _upload(self, step: _Step, batch: StepBatch) -> None:
        step.staging.reverse()  # the other one may still be on its way
        self._fill(step.staging[0].numpy(), batch)
        step.inputs.copy_(step.staging[0], non_blocking=True)

    def _fill(self, rows: Any, batch: StepBatch) -> None:
        """The step's inputs; what fills it up writes to the spare block, where nobody reads."""
        num_parts, width = len(batch.context_lens), batch.block_tables.shape[1]
        rows[num_parts:] = self._idle_row()
        rows[:num_parts, 0], rows[:num_parts, 1] = batch.token_ids, batch.positions
        rows[:num_parts, 2], rows[:num_parts, 3] = batch.slots, batch.context_lens
        rows[:num_parts, 4 : 4 + width] = batch.block_tables

    def _idle_row(self) -> Any:
        row = np.zeros(self._width, np.int64)
        row[2], row[3], row[4] = self._cache.num_blocks * BLOCK_SIZE, 1, self._cache.num_blocks
        return row

    def _capture_step(self, size: int) -> _Step:
        """Captured with idle rows only."""
        device = self._cache.device
        pinned = device.type == "cuda"
        staging = [torch.zeros((size, self._width), dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        staging[0][:] = torch.from_numpy(self._idle_row())
        inputs = staging[0].to(device, copy=True)
        tokens = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)

        def run() -> torch.Tensor:
            context = DecodeContext(inputs, self._cache, self._attend)
            logits: torch.Tensor = self._model(
                input_ids=context.token_ids[None], position_ids=context.positions[None], use_cache=False, paged=context
            ).logits[0]
            return logits.float()

        if not self._capture:
            return _Step(staging, tokens, inputs, run)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = run()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return _Step(staging, tokens, inputs, replay)
