"""Tokens for many rows at once on an accelerator, given one upload and fetched by one transfer; as `draw` on the host.

Random numbers, order of cuts and drawing are those of `draw.draw`. What is summed is summed in float64, so that neither
rounding nor the other rows of a step move a boundary. Nothing asks how many tokens a cut leaves, which would be a wait.
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

ROWS_AT_ONCE = 64
"""Of those that are drawn or measured, so that what is computed in between stays small."""
ORDER_OF_ONE = 0x3F800000
"""The bits of the largest weight. As whole numbers, bits of floats that are not negative have the floats' order."""
FINE_BITS = 15
"""Of a weight's place in the order: those that tell apart what lies in one coarse bin."""
TOKEN, FINITE, LOGPROB, TOP = range(4)
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
    table = download(_choose(logits, raw, params, positions))
    return lambda: [_read(row, each) for row, each in zip(table(), params, strict=True)]


def _read(row: npt.NDArray[np.float64], params: SamplingParams) -> Drawn:
    """From a row of the table."""
    if params.logprobs is None or not row[FINITE]:
        return Drawn(bool(row[FINITE]), int(row[TOKEN]), None)
    most = (len(row) - TOP) // 2
    count = min(params.logprobs, most)
    ids, values = row[TOP : TOP + count], row[TOP + most : TOP + most + count]
    top = tuple((int(i), float(value)) for i, value in zip(ids, values, strict=True))
    return Drawn(True, int(row[TOKEN]), TokenLogprob(int(row[TOKEN]), float(row[LOGPROB]), top))


def _choose(logits: torch.Tensor, raw: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> torch.Tensor:
    """The table [N, columns]."""
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
        tokens[rows] = _draw(logits[rows], group, *given)
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
) -> torch.Tensor:
    """A token for each row of logits [n, vocab]; of a row that is not finite, any."""
    scaled = (logits - logits.amax(-1, keepdim=True)) * scale[:, None]
    if group.most_k:
        ranked = scaled.topk(group.most_k).values
        least = ranked.gather(-1, (top_k - 1).clamp_min(0)[:, None])
        scaled = scaled.masked_fill((scaled < least) & (top_k > 0)[:, None], -torch.inf)
    weights = scaled.exp_()
    if group.is_ranked:
        return _draw_ranked(weights, top_p, min_p, uniform)
    return _draw_in_order(weights.masked_fill_(weights < min_p[:, None], 0), uniform)


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
    weights: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """The same among the likeliest that make up top_p, and of these those from min_p on, from the least likely on."""
    weights.nan_to_num_(0.0)
    needed = top_p * weights.sum(-1, dtype=torch.float64)
    order = Order(weights.masked_fill_(weights < min_p[:, None], 0))
    return order.token(order.find(order.find(needed[:, None]).mass * (1 - uniform[:, None])))


class Place(NamedTuple):
    """Where a sum of weights in their order comes to what was looked for, for each row [n, 1]."""

    key: torch.Tensor
    """The weight's place in the order."""
    number: torch.Tensor
    """Which of equal weights it is, in the vocabulary's order, from 1 on."""
    mass: torch.Tensor
    """The sum up to it, itself included."""


class Order:
    """The order of weights [n, vocab] from 0 to 1, the largest first; of equal ones the vocabulary's first.

    Sums in that order are looked up without sorting, as radix selection finds a rank (Alabi et al. 2012): weights are
    summed up by coarse bins, then those of the bin that matters, value by value. What a bin holds has one exponent, so
    that its sum in float64 is exact, in whatever order a device adds.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights
        self._keys = ORDER_OF_ONE - weights.view(torch.int32)
        self._coarse = self._keys >> FINE_BITS
        self._elsewhere = torch.arange(weights.shape[1], device=weights.device) % (1 << FINE_BITS)
        self._ends = self._sum(self._coarse, weights > 0)

    def find(self, mass: torch.Tensor) -> Place:
        """The first at which the sum is at least `mass` [n, 1]; the last that has any weight where none is."""
        mass = torch.minimum(mass, self._ends[:, -1:])
        coarse, before = _reach(self._ends, mass)
        ends = self._sum(self._keys & ((1 << FINE_BITS) - 1), self._coarse == coarse)
        rest = torch.minimum(mass - before, ends[:, -1:])
        fine, within = _reach(ends, rest)
        # Sums that a device makes in parallel may waver in a last digit over the empty bins behind all weights.
        key = ((coarse << FINE_BITS) + fine).clamp_max_(ORDER_OF_ONE - 1)
        weight = (ORDER_OF_ONE - key).int().view(torch.float32).double()
        number = ((rest - within) / weight).ceil_().clamp_min_(1)
        found = before + (within + number * weight)
        return Place(key, number, torch.minimum(found, self._ends.gather(-1, coarse)))

    def token(self, place: Place) -> torch.Tensor:
        """The tokens [n] that are there."""
        counts = (self._keys == place.key).cumsum(-1, dtype=torch.int32)
        at = torch.searchsorted(counts, torch.minimum(place.number.int(), counts[:, -1:]))
        # Where nobody is, a last digit wavered over an empty bin, or the row is not finite.
        return torch.where(counts[:, -1] > 0, at[:, 0], self._weights.argmax(-1))

    def _sum(self, bins: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        """Sums of what is counted, up to each bin's end [n, bins]; the rest adds zeros, all over lest they queue."""
        sums = torch.zeros((len(bins), 1 << FINE_BITS), dtype=torch.float64, device=bins.device)
        sums.scatter_add_(-1, torch.where(counted, bins, self._elsewhere), (self._weights * counted).double())
        return sums.cumsum_(-1)


def _reach(ends: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first bin [n, 1] whose end is at least `mass`, and the end of the one before it."""
    at = torch.searchsorted(ends, mass)
    return at, ends.gather(-1, (at - 1).clamp_min(0)) * (at > 0)


def rank_tokens(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of values float32 [n, vocab] and where they are, [n, count]; of equal ones the vocabulary's first.

    By whole numbers that have the values' order in their upper half and the places in their lower, so that no two are
    alike.
    """
    vocab = values.shape[1]
    bits = (values + 0.0).view(torch.int32)  # of two zeros one
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) + torch.arange(vocab - 1, -1, -1, device=values.device)
    ids = vocab - 1 - (keys.topk(count).values & 0xFFFFFFFF)
    return values.gather(-1, ids), ids


def measure_rows(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """[n, 1 + 2 * count]: the tokens' log probabilities, the likeliest tokens, and theirs. See `sampler.measure`."""
    largest = logits.amax(-1, keepdim=True)
    norm = largest.double() + (logits - largest).exp_().sum(-1, keepdim=True, dtype=torch.float64).log()
    own = logits.gather(-1, tokens[:, None]).double() - norm
    values, ids = rank_tokens(logits, count)
    return torch.cat([own, ids.double(), values.double() - norm], -1)
