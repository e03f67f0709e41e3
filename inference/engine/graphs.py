"""Decode steps as CUDA graphs over padded batch sizes; other steps run as they come."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from inference.engine.attention import DecodeKernel, Rule
from inference.engine.batch import StepBatch
from inference.engine.kv_cache import BLOCK_SIZE, KVCache
from inference.engine.modules import ModulesForward
from inference.engine.transfer import upload

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, *range(16, 257, 16))
"""Sequences of a captured step; one that has fewer is filled up, one with more than the last is not captured."""
HEAD = 4
"""Numbers of a sequence before its block table: token, position, slot, context length."""
FIXED_BYTES = 256 * 2**20
"""For captured steps whatever their size: what cuBLAS works in, and the graphs themselves."""


def sizes_for(max_batch_size: int) -> tuple[int, ...]:
    """The sizes that batches of up to so many sequences need."""
    return tuple(size for at, size in enumerate(SIZES) if not at or SIZES[at - 1] < max_batch_size)


def memory_bytes(max_batch_size: int, vocab_size: int) -> int:
    """What captured steps will need: logits, the model's own, its layers."""
    return FIXED_BYTES + 3 * 4 * sizes_for(max_batch_size)[-1] * vocab_size


class DecodeContext:
    """What attention sees of a decode step: tensors that stay where they are while their content changes."""

    def __init__(self, inputs: torch.Tensor, cache: KVCache, attend: DecodeKernel) -> None:
        """`inputs` int32 [sequences, HEAD + blocks]."""
        self._cache, self._attend = cache, attend
        self.layers_seen: list[int] = []
        head = inputs[:, :HEAD].t().to(torch.int64, memory_format=torch.contiguous_format)
        self.token_ids, self.positions, slots, self._contexts = head
        self._blocks, self._offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        self._tables = inputs[:, HEAD:]

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
        keys[self._blocks, :, :, self._offsets] = key[0].transpose(0, 1)
        values[self._blocks, :, self._offsets] = value[0].transpose(0, 1)
        asked = query[0].transpose(0, 1)
        return self._attend(asked, keys, values, self._tables, self._contexts, rule)


class GraphedForward:
    """A forward pass whose decode steps are replayed, in the sizes that were made ready.

    Sizes have their inputs and their logits in the same places: those of a step are gone when the next one runs.
    """

    def __init__(
        self,
        modules: ModulesForward,
        model: PreTrainedModel,
        cache: KVCache,
        attend: DecodeKernel,
        max_model_len: int,
        *,
        check: Callable[[Callable[[StepBatch], torch.Tensor]], object] = lambda _: None,
        as_graphs: bool = True,
    ) -> None:
        """Nothing is ready yet: all steps run as they come.

        `check` raises where a forward pass does not give the model's own logits, and leaves the cache as it was.
        `as_graphs=False`: sizes are filled up to without graphs, on any device.
        """
        self._modules, self._model, self._cache, self._attend = modules, model, cache, attend
        self._check = check
        self._make = _Recorder(cache.device).record if as_graphs else _plain
        self._runs: dict[int, Callable[[], None]] = {}
        """By size, what computes the logits of the inputs."""
        self._tried: set[int] = set()
        """Sizes that are ready, and those that cannot be."""
        self._ready_for = 0
        """Batches of up to so many sequences lack no size that was not tried."""
        most, self._width = SIZES[-1], HEAD + -(-max_model_len // BLOCK_SIZE)
        pinned = cache.device.type == "cuda"
        self._staging = [torch.zeros(most * self._width, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        """Host memory for the inputs, twice: the latter is filled next, while the former may still be read."""
        self._tokens = torch.zeros(most, dtype=torch.int32, pin_memory=pinned)
        self._inputs = torch.zeros((most, self._width), dtype=torch.int32, device=cache.device)
        """See DecodeContext."""
        self._rows = torch.empty(0)
        self._logits: dict[int, torch.Tensor] = {}
        """By size, where they go: the first of `_rows`, or of those before that were too few for a later size."""
        self._prepared: tuple[StepBatch, int] | None = None
        """Whose tables are on the device, or on their way there, and in which size."""

    @property
    def sizes(self) -> list[int]:
        """Of the steps that are replayed, ascending."""
        return sorted(self._runs)

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        """Logits [N, vocab] of the batch's sample rows."""
        return self._run(1, batch)

    def filled_up(self, size: int) -> Callable[[StepBatch], torch.Tensor]:
        """The same, with decode steps filled up to at least so many sequences."""
        return partial(self._run, size)

    def prepare(self, batch: StepBatch) -> None:
        """Send a decode step's tables ahead, behind the step that runs; its tokens come with the call."""
        self._prepared = None
        size = self._size_of(len(batch.context_lens))
        if size is not None:
            self._send(batch, size)
            self._prepared = batch, size

    def capture(self, max_batch_size: int) -> None:
        """Make all sizes ready that batches of so many sequences need, the largest first; others use its memory."""
        while self._lacks(max_batch_size):
            self.extend(max_batch_size)

    def extend(self, max_batch_size: int) -> int | None:
        """Make the largest size ready that such batches lack; which, if it is served now. Not while a step runs.

        Runs on idle rows and forgets what was prepared. Where a size cannot be made ready, which is said, its steps run
        in a larger one or as they come.
        """
        if not (lacking := self._lacks(max_batch_size)):
            return None
        size = lacking[-1]
        self._tried.add(size)
        self._prepared = None
        try:
            self._inputs[:, : HEAD + 1] = torch.from_numpy(self._idle_row()).to(self._cache.device)
            if self._record(size):
                self._check(self.filled_up(size))
                logger.info("Captured decode steps of %d sequences, %d sizes to go", size, len(lacking) - 1)
                return size
        except torch.OutOfMemoryError:
            logger.warning("There is no memory to capture decode steps of %d sequences", size)
        except Exception:
            logger.warning("Captured decode steps of %d sequences are not used", size, exc_info=True)
        self._runs.pop(size, None)
        return None

    def _lacks(self, max_batch_size: int) -> list[int]:
        """Sizes, ascending, that are to be tried for batches of up to so many sequences."""
        if max_batch_size <= self._ready_for:
            return []
        lacking = [size for size in sizes_for(max_batch_size) if size not in self._tried]
        if not lacking:
            self._ready_for = max_batch_size
        return lacking

    def _record(self, size: int) -> bool:
        """Whether steps can be replayed here; else no other size is tried. Raises OutOfMemoryError."""
        try:
            self._runs[size] = self._make(partial(self._compute, size))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            logger.warning("Decode steps cannot be captured here", exc_info=True)
            self._tried.update(SIZES)
            return False
        return True

    def _run(self, least: int, batch: StepBatch) -> torch.Tensor:
        num_parts = len(batch.context_lens)
        size = self._size_of(max(least, num_parts))
        # Nobody waits for a step that samples nothing: the next would overwrite its inputs before they are read.
        if size is None or len(batch.token_ids) > num_parts or not len(batch.sample_rows):
            return self._modules(batch)
        if self._prepared is not None and self._prepared[0] is batch and self._prepared[1] == size:
            self._send_tokens(batch)
        else:
            self._send(batch, size)
        self._prepared = None
        self._runs[size]()
        logits = self._logits[size][:num_parts]
        if len(batch.sample_rows) == num_parts:
            return logits
        (rows,) = upload([batch.sample_rows], logits.device)
        return logits[rows]

    def _size_of(self, num_parts: int) -> int | None:
        return min((size for size in self._runs if size >= num_parts), default=None)

    def _send(self, batch: StepBatch, size: int) -> None:
        """A step's inputs, as far as its tables go; what fills it up writes to the spare block, where nobody reads."""
        self._staging.reverse()  # the other one may still be on its way
        num_parts, blocks = len(batch.context_lens), batch.block_tables.shape[1]
        staging = self._staging[0][: size * (HEAD + blocks)].view(size, HEAD + blocks)
        rows = staging.numpy()
        rows[num_parts:, : HEAD + 1] = self._idle_row()
        rows[:num_parts, 0], rows[:num_parts, 1] = batch.token_ids, batch.positions
        rows[:num_parts, 2], rows[:num_parts, 3] = batch.slots, batch.context_lens
        rows[:num_parts, HEAD:] = batch.block_tables
        self._inputs[:size, : HEAD + blocks].copy_(staging, non_blocking=True)

    def _send_tokens(self, batch: StepBatch) -> None:
        tokens = self._tokens[: len(batch.token_ids)]
        tokens.numpy()[:] = batch.token_ids
        self._inputs[: len(tokens), 0].copy_(tokens, non_blocking=True)

    def _idle_row(self) -> Any:
        spare = self._cache.num_blocks
        return np.array([0, 0, spare * BLOCK_SIZE, 1, spare], np.int32)

    def _compute(self, size: int) -> None:
        """The logits of the first rows of the inputs, to their place."""
        context = DecodeContext(self._inputs[:size], self._cache, self._attend)
        logits: torch.Tensor = self._model(
            input_ids=context.token_ids[None], position_ids=context.positions[None], use_cache=False, paged=context
        ).logits[0]
        if size not in self._logits:  # while it warms up
            if len(self._rows) < size:  # at first the largest comes first; what comes later may grow again
                shape = (SIZES[-1] if len(self._rows) else size, logits.shape[1])
                self._rows = torch.zeros(shape, dtype=torch.float32, device=logits.device)
            self._logits[size] = self._rows[:size]
        self._logits[size][:] = logits


def _plain(compute: Callable[[], None]) -> Callable[[], None]:
    compute()
    return compute


class _Recorder:
    """Records work on a device as CUDA graphs that share memory: no two of them may run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """What replays `compute`, which has run twice before: once to set up, once to see that it waits for nothing."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # torch.cuda.graph alone would not leave it where a capture cannot end
            compute()
            with no_waiting():
                compute()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                compute()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph.replay


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise RuntimeError where work waits for the device. In a capture that would leave torch's memory in disorder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not see all that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
