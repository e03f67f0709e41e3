"""The paged KV cache: its tensors, their copies in host memory, and how large both are made."""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from inference.engine.errors import ModelLoadError
from inference.engine.memory import free_bytes
from inference.host_memory import read_host_memory

logger = logging.getLogger(__name__)

BLOCK_SIZE = 16
"""Tokens a KV block holds."""
HOST_FRACTION = 0.25
"""Of the host memory that is free after loading; the rest belongs to activations and to other processes."""
DEVICE_FRACTION = 0.85
"""Of the CUDA memory that is free after loading."""
SWAP_FRACTION = 0.2
"""Of the host memory that is free once the cache is made, for what preempted sequences swap out."""
MAX_SWAP_BYTES = 4 * 2**30
"""Pinned memory is lost to everybody else on the host."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token of one layer keeps."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Size of one block over all layers, keys and values."""
        per_layer = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return self.num_layers * per_layer * BLOCK_SIZE


class KVCache:
    """Keys [num_blocks, num_kv_heads, head_dim, block_size] and values [.., block_size, head_dim] of every layer.

    Keys lie with the tokens of a block side by side, so that one vector instruction scores a block. `num_host_blocks`
    more have their place in host memory (pinned beside CUDA), all layers of a block together, for `swap_out`. One block
    behind the last is spare: steps that are filled up to a size write there. All of it but the host blocks of a CPU is
    resident at once, since it is filled with zeros.
    """

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device, num_host_blocks: int = 0) -> None:
        per_block = shape.num_kv_heads * shape.head_dim * BLOCK_SIZE
        per_key = (num_blocks + 1, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE)
        per_value = (num_blocks + 1, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.shape = shape
        self.num_blocks = num_blocks
        self.device = device
        self._blocks = torch.zeros((shape.num_layers, 2, num_blocks + 1, per_block), dtype=shape.dtype, device=device)
        self.keys = [layer[0].view(per_key) for layer in self._blocks]
        self.values = [layer[1].view(per_value) for layer in self._blocks]
        self.set_host_blocks(num_host_blocks)

    def set_host_blocks(self, num_blocks: int) -> None:
        """Make this the number of host blocks; it becomes 0 where the system does not give them."""
        size = (num_blocks, self.shape.num_layers, 2, self._blocks.shape[-1])
        try:
            self._host = torch.empty(
                size, dtype=self.shape.dtype, pin_memory=self.device.type == "cuda" and num_blocks > 0
            )
        except RuntimeError as error:  # of several classes; the system may let nobody pin so much
            logger.warning("There is no host memory for %d blocks, and nothing is swapped: %s", num_blocks, error)
            self._host = torch.empty((0, *size[1:]), dtype=self.shape.dtype)
        self.num_host_blocks = len(self._host)

    @contextmanager
    def kept(self, num_blocks: int) -> Iterator[None]:
        """What the first blocks hold is there again afterwards."""
        before = self._blocks[:, :, :num_blocks].clone()
        try:
            yield
        finally:
            self._blocks[:, :, :num_blocks] = before

    def swap_out(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy (device block, host block) pairs out. Raises IndexError for a block that is not there.

        On CUDA copies run in the stream of the steps, after those before and before those that come: whoever frees or
        overwrites a block afterwards needs no wait.
        """
        self._check(pairs, self.num_blocks, self.num_host_blocks)
        for block, place in pairs:
            _copy(self._host[place], self._blocks[:, :, block])

    def swap_in(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy (host block, device block) pairs back, in the same way."""
        self._check(pairs, self.num_host_blocks, self.num_blocks)
        for place, block in pairs:
            _copy(self._blocks[:, :, block], self._host[place])

    def _check(self, pairs: Seq[tuple[int, int]], num_from: int, num_to: int) -> None:
        for source, target in pairs:
            if not (0 <= source < num_from and 0 <= target < num_to):
                raise IndexError(f"Block {source} of {num_from} cannot be copied to block {target} of {num_to}.")


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy one block of all layers: in device memory CUDA first gathers it; short of that, each part goes alone."""
    try:
        target.copy_(source, non_blocking=True)
    except torch.OutOfMemoryError:
        for layer in range(len(target)):
            for half in range(2):
                target[layer, half].copy_(source[layer, half], non_blocking=True)


@dataclass(frozen=True, slots=True)
class DraftNeeds:
    """What a draft model that is loaded later will take."""

    block_bytes: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How many blocks, and why."""

    num_blocks: int
    reason: str


def size_cache(
    shape: KVShape,
    device: torch.device,
    *,
    max_batch_size: int,
    max_model_len: int,
    requested_bytes: int,
    draft: DraftNeeds | None = None,
    graph_bytes: int = 0,
) -> CacheSize:
    """Choose the number of blocks, each with its like in the draft model's cache, where there is one.

    One that takes what is free leaves `graph_bytes` to captured steps, a quarter of that at most: a step that cannot
    be captured is served all the same. Raises ModelLoadError where not even one full-length sequence fits.
    """
    one = -(-max_model_len // BLOCK_SIZE)
    block_bytes = shape.block_bytes + (draft.block_bytes if draft else 0)
    if requested_bytes:
        chosen = CacheSize(requested_bytes // block_bytes, f"kv_memory_bytes is {requested_bytes}")
    else:
        on_gpu = device.type == "cuda"
        fraction, place = (DEVICE_FRACTION, "device") if on_gpu else (HOST_FRACTION, "host")
        free = max(0, free_bytes(device) - (draft.weight_bytes if draft else 0))
        free -= min(graph_bytes, free // 4)
        fits, wanted = int(free * fraction) // block_bytes, one * max_batch_size
        if not on_gpu and wanted <= fits:
            chosen = CacheSize(wanted, f"enough for {max_batch_size} sequences of {max_model_len} tokens")
        else:
            chosen = CacheSize(fits, f"{fraction:.0%} of {free / 2**30:.1f} GiB free {place} memory")
    if chosen.num_blocks < one:
        raise ModelLoadError(
            f"The KV cache has room for {chosen.num_blocks * BLOCK_SIZE} tokens ({chosen.reason}), less than one "
            f"sequence of {max_model_len}. Lower max_model_len, or give more memory by kv_memory_bytes "
            f"({block_bytes // BLOCK_SIZE} bytes a token)."
        )
    return chosen


def size_host_cache(shape: KVShape, num_blocks: int) -> CacheSize:
    """Blocks of host memory for swapping, from what is free now; no more than the cache has itself."""
    free = read_host_memory().available
    room = min(int(free * SWAP_FRACTION), MAX_SWAP_BYTES) // shape.block_bytes
    if num_blocks <= room:
        return CacheSize(num_blocks, "as many as the cache has")
    reason = f"{SWAP_FRACTION:.0%} of {free / 2**30:.1f} GiB free host memory, at most {MAX_SWAP_BYTES / 2**30:.0f} GiB"
    return CacheSize(room, reason)
