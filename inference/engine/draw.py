"""Drawing a token from one row of logits on the host, in NumPy: its SIMD sort and exp beat torch's there many times."""

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from scheduling.core.sequence import SamplingParams

Floats = npt.NDArray[np.float32]
LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken; a quotient would leave float32."""
BLOCK = 128
"""Weights that are summed at once; only the block in which the drawn number lies is looked at one by one."""


def is_greedy(params: SamplingParams) -> bool:
    """Whether nothing is random."""
    return params.temperature < LEAST_TEMPERATURE


def draw(logits: Floats, largest: float, params: SamplingParams, uniform: float) -> int:
    """A token by temperature, then top-k, top-p and min-p, each of what the one before left.

    The order and the meaning are those of transformers' `GenerationMixin` with its `TopKLogitsWarper`,
    `TopPLogitsWarper` and `MinPLogitsWarper`. `logits` [vocab] is left as it is; `largest` is its finite maximum.
    `uniform` in [0, 1) picks by the inverse of the cumulative distribution in vocabulary order.
    """
    scaled = np.subtract(logits, np.float32(largest))
    scaled *= np.float32(1 / params.temperature)
    kept = None
    if 0 < params.top_k < len(scaled):
        least = np.partition(scaled, len(scaled) - params.top_k)[len(scaled) - params.top_k]
        kept = np.flatnonzero(scaled >= least)
        scaled = scaled[kept]
    weights = np.exp(scaled)
    if params.top_p < 1:
        at = _draw_ranked(weights, params.top_p, params.min_p, uniform)
    else:
        if params.min_p > 0:
            weights *= weights >= np.float32(params.min_p)
        at = _draw_in_order(weights, uniform)
    return at if kept is None else int(kept[at])


def _draw_in_order(weights: Floats, uniform: float) -> int:
    """The index whose part of the summed weights holds `uniform`."""
    ends = block_ends(weights)
    target = min(uniform * ends[-1], np.nextafter(ends[-1], 0.0))
    at = _count_within(weights, ends, target)
    if at == len(weights) or not weights[at]:  # sums of blocks and within a block are rounded apart
        at = int(np.flatnonzero(weights[: at + 1])[-1])
    return at


def _draw_ranked(weights: Floats, top_p: float, min_p: float, uniform: float) -> int:
    """The same among the largest weights that make up top_p of the sum and of these those from min_p on.

    Goes by rank, so that one sort serves cutting and drawing. Of equal weights the vocabulary's first rank first.
    """
    ranked = np.sort(weights)
    ends = block_ends(ranked)
    num_cut = count_outside(ranked, ends, top_p)
    if min_p > 0:
        num_cut = max(num_cut, int(np.searchsorted(ranked, np.float32(min_p))))
    before = _sum_of_first(ranked, ends, num_cut)
    target = before + uniform * (ends[-1] - before)
    at = min(max(num_cut, _count_within(ranked, ends, target)), len(ranked) - 1)
    alike = np.flatnonzero(weights == ranked[at])
    return int(alike[len(alike) - 1 - (at - int(np.searchsorted(ranked, ranked[at])))])


def count_outside(ranked: Floats, ends: npt.NDArray[np.float64], top_p: float) -> int:
    """How many of ascending weights the nucleus leaves out (Holtzman et al. 2020, section 3.1)."""
    return min(_count_within(ranked, ends, (1 - top_p) * ends[-1]), len(ranked) - 1)


def _count_within(weights: Floats, ends: npt.NDArray[np.float64], target: float) -> int:
    """The largest number of first weights whose sum is at most `target`."""
    block = int(np.searchsorted(ends, target, side="right"))
    own = weights[block * BLOCK : (block + 1) * BLOCK]
    inner = (ends[block - 1] if block else 0.0) + np.cumsum(own, dtype=np.float64)
    return block * BLOCK + int(np.searchsorted(inner, target, side="right"))


def _sum_of_first(weights: Floats, ends: npt.NDArray[np.float64], count: int) -> float:
    block = count // BLOCK
    whole = float(ends[block - 1]) if block else 0.0
    return whole + float(np.add.reduce(weights[block * BLOCK : count], dtype=np.float64))


def block_ends(weights: Floats) -> npt.NDArray[np.float64]:
    """Cumulative sums at the ends of blocks, the last of which may be short."""
    whole = len(weights) // BLOCK * BLOCK
    sums = np.add.reduce(weights[:whole].reshape(-1, BLOCK), axis=1)
    if whole < len(weights):
        sums = np.append(sums, np.add.reduce(weights[whole:]))
    return np.cumsum(sums, dtype=np.float64)


def uniforms(seeds: Seq[int], positions: Seq[int]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each pair of seed and position (SplitMix64: Steele, Lea and Flood 2014, section 3)."""
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], np.uint64)
    state = _mix(seed) + np.array(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
