"""Paged attention behind transformers' attention interface: any decoder-only architecture reads and writes our KV blocks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from inference.engine.batch import StepBatch
from inference.engine.errors import ModelLoadError
from inference.engine.kv_cache import BLOCK_SIZE, KVCache

NAME = "penstock_paged"


@dataclass(frozen=True, slots=True)
class Group:
    """Parts padded together: decodes in one group, prefill chunks in another."""

    rows: torch.Tensor
    """[n, longest query], token of the flat batch; padding repeats the part's last."""
    positions: torch.Tensor
    """[n, longest query]"""
    tables: torch.Tensor
    """[n, blocks]"""
    real: torch.Tensor
    """[tokens], positions in the flattened `rows` that are no padding."""
    tokens: torch.Tensor
    """[tokens], the flat batch's tokens they stand for."""


class PagedContext:
    """One step's cache, slots and groups on the device; transformers hands it down to every attention layer."""

    def __init__(self, batch: StepBatch, cache: KVCache, device: torch.device) -> None:
        self.batch = batch
        self.cache = cache
        self.layers_seen: list[int] = []
        slots = torch.from_numpy(batch.slots).to(device)
        self.blocks, self.offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        self.device = device
        self._groups: list[Group] | None = None

    @property
    def groups(self) -> list[Group]:
        """Made once a step, where the torch path needs them."""
        if self._groups is None:
            lengths = torch.from_numpy(self.batch.query_starts).diff()
            decodes = (lengths == 1).nonzero()[:, 0]
            chunks = (lengths > 1).nonzero()[:, 0]
            self._groups = [self._group(parts, lengths) for parts in (decodes, chunks) if len(parts)]
        return self._groups

    def _group(self, parts: torch.Tensor, lengths: torch.Tensor) -> Group:
        starts = torch.from_numpy(self.batch.query_starts[:-1]).long()[parts]
        sizes = lengths.long()[parts]
        contexts = torch.from_numpy(self.batch.context_lens).long()[parts]
        span = torch.arange(int(sizes.max()))
        inside = torch.minimum(span[None], sizes[:, None] - 1)
        rows = starts[:, None] + inside
        positions = (contexts - sizes)[:, None] + inside
        real = (span[None] < sizes[:, None]).flatten().nonzero()[:, 0]
        blocks = int(-(-contexts.max() // BLOCK_SIZE))
        tables = torch.from_numpy(self.batch.block_tables)[parts, :blocks].long()
        tokens = rows.flatten()[real]
        return Group(*(t.to(self.device) for t in (rows, positions, tables, real, tokens)))


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedContext | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values, then attend to everything in the cache up to each token.

    query is [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; the answer is [1, T, heads, head_dim].
    """
    if paged is None:
        raise ModelLoadError(
            f"{type(module).__name__} does not hand the KV cache to its attention; it cannot be served."
        )
    if s_aux is not None:
        raise ModelLoadError("Attention sinks are not supported; serve a model without them.")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.layers_seen.append(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    keys[paged.blocks, :, paged.offsets] = key[0].transpose(0, 1)
    values[paged.blocks, :, paged.offsets] = value[0].transpose(0, 1)
    out = torch.empty((query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    for group in paged.groups:
        out[group.tokens] = _attend(query[0], keys, values, group, scale, sliding_window or 0, softcap or 0.0)
    return out[None], None


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Group,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    count, heads = len(group.rows), query.shape[0]
    q = query[:, group.rows].transpose(0, 1)
    k = keys[group.tables].transpose(1, 2).flatten(2, 3)
    v = values[group.tables].transpose(1, 2).flatten(2, 3)
    at = torch.arange(k.shape[2], device=query.device)
    visible = at <= group.positions[:, None, :, None]
    if window:
        visible = visible & (at > group.positions[:, None, :, None] - window)
    if softcap:
        repeat = heads // k.shape[1]
        scores = q @ k.repeat_interleave(repeat, 1).transpose(2, 3) * scale
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~visible, float("-inf"))
        found = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v.repeat_interleave(repeat, 1)
    else:
        found = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=heads != k.shape[1]
        )
    return found.transpose(1, 2).reshape(count * q.shape[2], heads, -1)[group.real]


AttentionInterface.register(NAME, paged_attention_forward)
