"""Attention of one new token a sequence over paged keys and values, as a Triton kernel.

The context is split over programs whose sums are merged afterwards, so that few sequences keep a whole GPU busy
(flash-decoding: Dao et al. 2023); within one, softmax goes along as in Milakov and Gimelshein 2018.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from inference.engine.attention import Rule
from inference.engine.kv_cache import BLOCK_SIZE

TOKENS = 64
"""Of a context, per turn of a program's loop."""
PROGRAMS = 512
"""Enough to fill a large GPU."""
MAX_SPLITS = 16


# Compiled once for all batches, whose tables and contexts lie anywhere.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["width", "window"], do_not_specialize_on_alignment=["tables", "contexts"]
)
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, tables, contexts, out, sums, tops, totals, scale, softcap, window, width, kv_heads,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One split of one sequence's context, for the GROUP heads that share a key head.

    A context that is WHOLE, in one split, is answered in `out`; else its parts are left in the others for `_merge`.
    """
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    context = tl.load(contexts + sequence).to(tl.int32)
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    skipped = first // TOKENS
    turns = (context + TOKENS - 1) // TOKENS - skipped
    share = (turns + splits - 1) // splits
    begin = (skipped + split * share) * TOKENS
    rows, dims, steps = tl.arange(0, ROWS), tl.arange(0, PADDED), tl.arange(0, TOKENS)
    heads = sequence * kv_heads * GROUP + head * GROUP + rows
    real = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    q = tl.load(query + heads[:, None] * DIM + dims[None, :], mask=real, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(begin, tl.minimum(begin + share * TOKENS, context), TOKENS):
        tokens = start + steps
        seen = (tokens >= first) & (tokens < context)
        block = tl.load(tables + sequence * width + tokens // BLOCK, mask=seen, other=0).to(tl.int64)
        at = (block * kv_heads + head) * DIM * BLOCK
        offset = tokens % BLOCK
        inside = (dims < DIM)[:, None] & seen[None, :]
        k = tl.load(keys + at[None, :] + dims[:, None] * BLOCK + offset[None, :], mask=inside, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if softcap > 0:
            scores = (2 * tl.sigmoid(2 * scores / softcap) - 1) * softcap
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(top - higher)
        inside = seen[:, None] & (dims < DIM)[None, :]
        v = tl.load(values + at[:, None] + offset[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        found = found * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    if WHOLE:
        tl.store(out + heads[:, None] * DIM + dims[None, :], found / total[:, None], mask=real)
    else:
        place = heads * splits + split
        tl.store(sums + place[:, None] * DIM + dims[None, :], found, mask=real)
        tl.store(tops + place, top, mask=rows < GROUP)
        tl.store(totals + place, total, mask=rows < GROUP)


@triton.jit(do_not_specialize=["splits"])  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    out, sums, tops, totals, splits, DIM: tl.constexpr, PADDED: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The answer of one head of one sequence from those of its context's splits."""
    head = tl.program_id(0)
    parts, dims = tl.arange(0, MOST), tl.arange(0, PADDED)
    there = parts < splits
    top = tl.load(tops + head * splits + parts, mask=there, other=-1e30)
    share = tl.where(there, tl.exp(top - tl.max(top, 0)), 0.0)
    total = tl.sum(tl.load(totals + head * splits + parts, mask=there, other=0.0) * share, 0)
    inside = there[:, None] & (dims < DIM)[None, :]
    found = tl.load(sums + (head * splits + parts)[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    tl.store(out + head * DIM + dims, tl.sum(found * share[:, None], 0) / total, mask=dims < DIM)


def attend_decodes(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    contexts: torch.Tensor,
    rule: Rule,
) -> torch.Tensor:
    """query [S, heads, head_dim] over a layer of the cache; tables [S, blocks], contexts [S] with the new token.

    Answers [S, heads, head_dim]. No data goes to the host, so that it can be captured in a CUDA graph.
    """
    sequences, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    splits = max(1, min(MAX_SPLITS, PROGRAMS // (sequences * kv_heads), -(-tables.shape[1] * BLOCK_SIZE // TOKENS)))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = tops = totals = out  # none are needed
    if splits > 1:
        sums = query.new_empty((sequences, heads, splits, dim), dtype=torch.float32)
        tops, totals = (query.new_empty((sequences, heads, splits), dtype=torch.float32) for _ in range(2))
    grid: Any = (sequences, kv_heads, splits)
    _attend[grid](
        query.contiguous(), keys, values, tables, contexts, out, sums, tops, totals, rule.scale, rule.softcap,
        rule.window, tables.stride(0), kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim,
        PADDED=padded, BLOCK=BLOCK_SIZE, TOKENS=TOKENS, WHOLE=splits == 1,
    )  # fmt: skip
    if splits > 1:
        grid = (sequences * heads,)
        _merge[grid](out, sums, tops, totals, splits, DIM=dim, PADDED=padded, MOST=MAX_SPLITS)
    return out
