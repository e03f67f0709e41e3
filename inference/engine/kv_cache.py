"""The paged KV cache: its tensors and how large they are made."""

from dataclasses import dataclass

import psutil
import torch

from inference.engine.errors import ModelLoadError

BLOCK_SIZE = 16
"""Tokens a KV block holds."""
HOST_FRACTION = 0.25
"""Of the host memory that is free after loading; the rest belongs to activations and to other processes."""
DEVICE_FRACTION = 0.85
"""Of the CUDA memory that is free after loading."""


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

    Keys lie with the tokens of a block side by side, so that one vector instruction scores a block.
    """

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device) -> None:
        per_key = (num_blocks, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE)
        per_value = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.shape = shape
        self.num_blocks = num_blocks
        self.keys = [torch.zeros(per_key, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]
        self.values = [torch.zeros(per_value, dtype=shape.dtype, device=device) for _ in range(shape.num_layers)]


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How many blocks, and why."""

    num_blocks: int
    reason: str


def size_cache(
    shape: KVShape, device: torch.device, *, max_batch_size: int, max_model_len: int, requested_bytes: int
) -> CacheSize:
    """Choose the number of blocks. Raises ModelLoadError where not even one full-length sequence fits."""
    one = -(-max_model_len // BLOCK_SIZE)
    if requested_bytes:
        chosen = CacheSize(requested_bytes // shape.block_bytes, f"kv_memory_bytes is {requested_bytes}")
    else:
        free, fraction, place = _free_bytes(device)
        fits, wanted = int(free * fraction) // shape.block_bytes, one * max_batch_size
        if device.type == "cpu" and wanted <= fits:
            chosen = CacheSize(wanted, f"enough for {max_batch_size} sequences of {max_model_len} tokens")
        else:
            chosen = CacheSize(fits, f"{fraction:.0%} of {free / 2**30:.1f} GiB free {place} memory")
    if chosen.num_blocks < one:
        raise ModelLoadError(
            f"The KV cache has room for {chosen.num_blocks * BLOCK_SIZE} tokens ({chosen.reason}), less than one "
            f"sequence of {max_model_len}. Lower max_model_len, or give more memory by kv_memory_bytes "
            f"({shape.block_bytes // BLOCK_SIZE} bytes a token)."
        )
    return chosen


def _free_bytes(device: torch.device) -> tuple[int, float, str]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], DEVICE_FRACTION, "device"
    return psutil.virtual_memory().available, HOST_FRACTION, "host"
