"""Tokens for many rows at once on an accelerator, given one upload and fetched by one transfer; as `draw` on the host.

Random numbers, order of cuts and drawing are those of `draw.draw`. What is summed is summed in float64, so that neither
rounding nor the other rows of a step move a boundary.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from inference.engine.draw import BLOCK, is_greedy, uniforms
from inference.engine.transfer import download, upload
from scheduling.core.sequence import SamplingParams, TokenLogprob

FEW_TOKENS = 256
"""Likeliest tokens among which a nucleus is looked for first; one that reaches further costs another transfer."""
ROWS_AT_ONCE = 64
"""Of those that are drawn or measured, so that what is computed in between stays small."""
TOKEN, FINITE, UNSURE, LOGPROB, TOP = range(5)
"""Columns of the table that is fetched; from the last one on the likeliest tokens, then their log probabilities."""


class Drawn(NamedTuple):
    """What was chosen of one row; `token_id` counts only where the row was finite."""

    is_finite: bool
    token_id: int
    logprob: TokenLogprob | None


class Group(NamedTuple):
    """Rows that are drawn in one way, and their parameters."""

    is_ranked: bool
    """By rank, among those that make up top_p; else in the order of the vocabulary."""
    most_k: int
    """The largest top_k; 0 where none cuts."""
    arrays: tuple[npt.NDArray[Any], ...]
    """rows, 1 / temperature, top_k (0: all), top_p, min_p, uniform."""


def choose(
    logits: torch.Tensor, raw: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int]
) -> Callable[[], list[Drawn]]:
    """Begin to choose a token for each row of logits [N, vocab]; the call that is returned waits for them.

    `raw` are the model's own logits, for log probabilities.
    """
    table = download(_choose(logits, raw, params, positions, FEW_TOKENS))

    def wait() -> list[Drawn]:
        found = table()
        drawn = [_read(row, each) for row, each in zip(found, params, strict=True)]
        again: list[int] = np.flatnonzero(found[:, UNSURE] * found[:, FINITE]).tolist()
        if again:
            (rows,) = upload([np.array(again, np.int64)], logits.device)
            some = [params[i] for i in again], [positions[i] for i in again]
            for i, row in zip(again, download(_choose(logits[rows], raw[rows], *some, logits.shape[1]))(), strict=True):
                drawn[i] = _read(row, params[i])
        return drawn

    return wait


def _read(row: npt.NDArray[np.float64], params: SamplingParams) -> Drawn:
    """From a row of the table."""
    if params.logprobs is None or not row[FINITE]:
        return Drawn(bool(row[FINITE]), int(row[TOKEN]), None)
    most = (len(row) - TOP) // 2
    count = min(params.logprobs, most)
    ids, values = row[TOP : TOP + count], row[TOP + most : TOP + most + count]
    top = tuple((int(i), float(value)) for i, value in zip(ids, values, strict=True))
    return Drawn(True, int(row[TOKEN]), TokenLogprob(int(row[TOKEN]), float(row[LOGPROB]), top))


def _choose(
    logits: torch.Tensor, raw: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int], few: int
) -> torch.Tensor:
    """The table [N, columns]; nuclei are looked for among `few` likeliest tokens."""
    num_rows, vocab = logits.shape
    groups = list(_groups(params, positions, vocab))
    told = np.array([i for i, p in enumerate(params) if p.logprobs is not None], np.int64)
    moved = iter(upload([told, *(array for group in groups for array in group.arrays)], logits.device))
    measured = next(moved)
    best, tokens = logits.max(-1)
    most = min(max((p.logprobs or 0 for p in params), default=0), vocab)
    table = torch.zeros((num_rows, TOP + 2 * most), dtype=torch.float64, device=logits.device)
    table[:, FINITE] = torch.isfinite(best)
    for group in groups:
        rows, *given = (next(moved) for _ in group.arrays)
        drawn, unsure = _draw(logits[rows], group, *given, few=few)
        tokens[rows] = drawn
        table[rows, UNSURE] = unsure.double()
    table[:, TOKEN] = tokens
    for rows in measured.split(ROWS_AT_ONCE) if len(told) else ():
        table[rows, LOGPROB:] = measure_rows(raw[rows].float(), tokens[rows], most)
    return table


def _groups(params: Seq[SamplingParams], positions: Seq[int], vocab: int) -> Iterator[Group]:
    for is_ranked in (False, True):
        drawn = [i for i, p in enumerate(params) if not is_greedy(p) and (p.top_p < 1) == is_ranked]
        for start in range(0, len(drawn), ROWS_AT_ONCE):
            rows = drawn[start : start + ROWS_AT_ONCE]
            some = [params[i] for i in rows]
            top_k = np.array([p.top_k if 0 < p.top_k < vocab else 0 for p in some], np.int64)
            arrays = (
                np.array(rows, np.int64),
                np.array([1 / p.temperature for p in some], np.float32),
                top_k,
                np.array([p.top_p for p in some], np.float64),
                np.array([p.min_p for p in some], np.float32),
                uniforms([p.seed for p in some], [positions[i] for i in rows]),
            )
            yield Group(is_ranked, int(top_k.max()), arrays)


def _draw(
    logits: torch.Tensor,
    group: Group,
    scale: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    few: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits [n, vocab], and whether it is none yet, as its nucleus reaches too far."""
    scaled = (logits - logits.amax(-1, keepdim=True)) * scale[:, None]
    if group.most_k:
        ranked = scaled.topk(group.most_k).values
        least = ranked.gather(-1, (top_k - 1).clamp_min(0)[:, None])
        scaled = scaled.masked_fill((scaled < least) & (top_k > 0)[:, None], -torch.inf)
    weights = scaled.exp_()
    if group.is_ranked:
        return _draw_ranked(weights, top_p, min_p, uniform, few)
    weights = weights.masked_fill_(weights < min_p[:, None], 0)
    return _draw_in_order(weights, uniform), torch.zeros_like(top_k)


def _draw_in_order(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token whose part of the summed weights [n, vocab] holds `uniform`: first its block, then its place there."""
    num_rows, vocab = weights.shape
    blocks = functional.pad(weights, (0, -vocab % BLOCK)).view(num_rows, -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    top = ends[:, -1]
    target = torch.minimum(uniform * top, torch.nextafter(top, torch.zeros_like(top)))[:, None]
    block = torch.searchsorted(ends, target, right=True).clamp_max_(blocks.shape[1] - 1)
    before = ends.gather(-1, (block - 1).clamp_min(0)) * (block > 0)
    own = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0]
    place = torch.searchsorted(before + own.cumsum(-1, dtype=torch.float64), target, right=True)
    # Sums of blocks and within a block are rounded apart: the last that has any weight is the furthest.
    last = ((own > 0) * torch.arange(BLOCK, device=own.device)).amax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(place, last))[:, 0]


def _draw_ranked(
    weights: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, uniform: torch.Tensor, few: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same among the likeliest that make up top_p, and of these those from min_p on, from the least likely on."""
    count = min(few, weights.shape[1])
    ranked, ids = rank_tokens(weights, count)
    sums = ranked.cumsum(-1, dtype=torch.float64)
    needed = top_p * weights.sum(-1, dtype=torch.float64)
    kept = (sums - ranked < needed[:, None]) & (ranked >= min_p[:, None])
    num_kept = kept.sum(-1, keepdim=True).clamp_min_(1)  # a row that is not finite keeps none
    target = sums.gather(-1, num_kept - 1) * (1 - uniform[:, None])
    place = torch.minimum(torch.searchsorted(sums, target), num_kept - 1)
    return ids.gather(-1, place)[:, 0], (num_kept[:, 0] == count) & (count < weights.shape[1])


def rank_tokens(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of values float32 [n, vocab] and where they are, [n, count]; of equal ones the vocabulary's first.

    By whole numbers that have the values' order in their upper half and the places in their lower, so that no two are
    alike.
    """
    vocab = values.shape[1]
    bits = (values + 0.0).view(torch.int32)  # of two zeros one
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) + torch.arange(vocab - 1, -1, -1, device=values.device)
    largest = keys.topk(count).values if count < vocab else keys.sort(descending=True).values
    ids = vocab - 1 - (largest & 0xFFFFFFFF)
    return values.gather(-1, ids), ids


def measure_rows(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """[n, 1 + 2 * count]: the tokens' log probabilities, the likeliest tokens, and theirs. See `sampler.measure`."""
    largest = logits.amax(-1, keepdim=True)
    norm = largest.double() + (logits - largest).exp_().sum(-1, keepdim=True, dtype=torch.float64).log()
    own = logits.gather(-1, tokens[:, None]).double() - norm
    values, ids = rank_tokens(logits, count)
    return torch.cat([own, ids.double(), values.double() - norm], -1)
