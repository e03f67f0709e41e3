"""Paged attention behind transformers' attention interface: any decoder-only architecture uses our KV blocks."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AttentionInterface

from inference.engine.batch import StepBatch
from inference.engine.errors import ModelLoadError
from inference.engine.kv_cache import BLOCK_SIZE, KVCache
from inference.engine.native import BoundBatch, Heads
from inference.engine.transfer import upload

NAME = "penstock_paged"
LONG_TOKENS = 64
"""Of a part that is computed by itself, where no compiled kernel takes them all."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a layer weighs keys: by products times `scale`, those of the last `window` tokens; 0 is no limit."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    """Products come no higher than this; 0 is no limit."""


DecodeKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Rule], torch.Tensor]
"""See paged_triton.attend_decodes."""


class Context(Protocol):
    """What transformers hands down to every attention layer: a step's batch and the cache, on the device."""

    layers_seen: list[int]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        """Write keys and values [1, kv_heads, T, head_dim]; [T, heads, head_dim] for query [1, heads, T, head_dim]."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parts padded together, which are about as long as each other."""

    whole: int
    """Tokens of the one prompt that is the group from its first token on; such need no mask. Else 0."""
    longest: int
    """Tokens of its longest query."""
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
    contexts: torch.Tensor
    """[n], tokens of each sequence."""
    dead: torch.Tensor | None
    """[n, 1, blocks * BLOCK_SIZE, 1], cache slots past the context: they hold what another sequence left, even NaN.

    None for decodes that a kernel computes.
    """


class Layout(NamedTuple):
    """A group before it is on the device."""

    whole: int
    longest: int
    arrays: tuple[npt.NDArray[Any], ...]
    """In the order of `Group`, without `dead`."""


def split(batch: StepBatch, *, by_context: bool) -> list[npt.NDArray[np.int64]]:
    """The step's parts in groups, so that padding makes little of what is computed.

    A part of many tokens is a group of its own. Shorter ones are together with those that have, within a factor of two,
    as many tokens and, where decodes are not the kernel's business, as long a context.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    lengths = np.diff(batch.query_starts).tolist()
    for part, (length, context) in enumerate(zip(lengths, batch.context_lens.tolist(), strict=True)):
        blocks = (-(-context // BLOCK_SIZE) - 1).bit_length() if by_context or length > 1 else 0
        key = (length, part) if length >= LONG_TOKENS else ((length - 1).bit_length(), -1, blocks)
        groups.setdefault(key, []).append(part)
    return [np.array(parts, np.int64) for parts in groups.values()]


def lay_out(batch: StepBatch, parts: npt.NDArray[np.int64]) -> Layout:
    """One group of a step."""
    starts, sizes = batch.query_starts[parts].astype(np.int64), np.diff(batch.query_starts)[parts]
    contexts = batch.context_lens[parts].astype(np.int64)
    span = np.arange(sizes.max())
    inside = np.minimum(span[None], sizes[:, None] - 1)
    rows = starts[:, None] + inside
    real = np.flatnonzero(span[None] < sizes[:, None])
    blocks = -(-int(contexts.max()) // BLOCK_SIZE)
    whole = int(contexts[0]) if len(parts) == 1 and sizes[0] == contexts[0] else 0
    arrays = (
        rows,
        (contexts - sizes)[:, None] + inside,
        batch.block_tables[parts, :blocks],
        real,
        rows.reshape(-1)[real],
        contexts,
    )
    return Layout(whole, len(span), arrays)


class PagedContext:
    """Any step."""

    def __init__(
        self,
        batch: StepBatch,
        cache: KVCache,
        device: torch.device,
        kernels: ctypes.CDLL | None,
        decode: DecodeKernel | None = None,
    ) -> None:
        self.decode = decode
        self.batch = batch
        self.cache = cache
        self.device = device
        self.kernels = kernels
        self.bound = BoundBatch(batch) if kernels else None
        self.layers_seen: list[int] = []
        if kernels is None:
            groups = [lay_out(batch, parts) for parts in split(batch, by_context=decode is None)]
            slots, *moved = upload([batch.slots, *(array for group in groups for array in group.arrays)], device)
            self.blocks, self.offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
            given = iter(moved)
            self.groups = [self._place(group, *islice(given, len(group.arrays))) for group in groups]

    def _place(self, layout: Layout, *tensors: torch.Tensor) -> Group:
        rows, positions, tables, real, tokens, contexts = tensors
        dead = None
        if self.decode is None or layout.longest > 1:
            at = torch.arange(tables.shape[1] * BLOCK_SIZE, device=self.device)
            dead = (at >= contexts[:, None])[:, None, :, None]
        return Group(layout.whole, layout.longest, rows, positions, tables, real, tokens, contexts, dead)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
    ) -> torch.Tensor:
        """By our kernels, or in plain torch on any device."""
        attend = _attend_padded if self.kernels is None else _attend_native
        return attend(self, layer, query, key, value, rule)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Context | None = None,
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
        raise ModelLoadError(f"{type(module).__name__} does not hand the KV cache to its attention.")
    if s_aux is not None:
        raise ModelLoadError("Attention sinks are not supported; serve a model without them.")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.layers_seen.append(layer)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rule = Rule(scale, int(sliding_window or 0), float(softcap or 0.0))
    return paged.attend(layer, query, key, value, rule)[None], None


def _attend_native(
    paged: PagedContext,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
) -> torch.Tensor:
    """The compiled kernel: reads the blocks where they lie."""
    assert paged.kernels is not None
    assert paged.bound is not None
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    _, heads, tokens, head_dim = query.shape
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    if key.shape[1:] != (keys.shape[1], tokens, head_dim) or value.shape != key.shape or keys.shape[2] != head_dim:
        raise ModelLoadError("The heads of this model are not alike in number or size over its layers.")
    out = torch.empty((tokens, heads, head_dim))
    shape = Heads(heads, keys.shape[1], head_dim, rule.window, rule.scale, rule.softcap)
    strides = (ctypes.c_long * 6)(*(t.stride(d) for t in (query, key, value) for d in (2, 1)))
    paged.kernels.paged_attention(
        ctypes.addressof(shape), paged.bound.address, query.data_ptr(), key.data_ptr(), value.data_ptr(),
        ctypes.addressof(strides), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def _attend_padded(
    paged: PagedContext,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
) -> torch.Tensor:
    """Plain torch, on any device: gathers the contexts of a group and attends under a mask."""
    keys, values = paged.cache.keys[layer], paged.cache.values[layer]
    keys[paged.blocks, :, :, paged.offsets] = key[0].transpose(0, 1)
    values[paged.blocks, :, paged.offsets] = value[0].transpose(0, 1)
    out = torch.empty((query.shape[2], query.shape[1], value.shape[3]), dtype=query.dtype, device=query.device)
    for group in paged.groups:
        if paged.decode is not None and group.longest == 1:
            asked = query[0].transpose(0, 1)[group.tokens]
            found = paged.decode(asked, keys, values, group.tables, group.contexts, rule)
        else:
            found = _attend_group(query[0], keys, values, group, rule)
        out[group.tokens] = found
    return out


def _attend_group(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Group,
    rule: Rule,
) -> torch.Tensor:
    assert group.dead is not None
    q = query[:, group.rows].transpose(0, 1)
    k = keys[group.tables].permute(0, 2, 1, 4, 3).flatten(2, 3).masked_fill(group.dead, 0)
    v = values[group.tables].transpose(1, 2).flatten(2, 3).masked_fill(group.dead, 0)
    repeat = query.shape[0] // k.shape[1]
    if group.whole and not rule.window and not rule.softcap:
        k, v = k[:, :, : group.whole], v[:, :, : group.whole]
        found = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=rule.scale, enable_gqa=repeat > 1
        )
        return found.transpose(1, 2).flatten(0, 1)[group.real]
    at = torch.arange(k.shape[2], device=query.device)
    positions = group.positions[:, None, :, None]
    visible = at <= positions
    if rule.window:
        visible = visible & (at > positions - rule.window)
    if rule.softcap:
        scores = q @ k.repeat_interleave(repeat, 1).transpose(2, 3) * rule.scale
        scores = (torch.tanh(scores / rule.softcap) * rule.softcap).masked_fill(~visible, float("-inf"))
        found = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v.repeat_interleave(repeat, 1)
    else:
        found = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=rule.scale, enable_gqa=repeat > 1
        )
    return found.transpose(1, 2).flatten(0, 1)[group.real]


AttentionInterface.register(NAME, paged_attention_forward)
