"""Drawing a token from one row of logits on the host, in NumPy: its SIMD sort and exp beat torch's there many times."""

import math
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
    if params.top_p < 1:
        inside = _nucleus(scaled, params.top_p)
        kept = inside if kept is None else kept[inside]
        scaled = scaled[inside]
    if params.min_p > 0:
        likely = np.flatnonzero(scaled >= np.float32(math.log(params.min_p)))
        kept = likely if kept is None else kept[likely]
        scaled = scaled[likely]
    at = _invert(scaled, uniform)
    return at if kept is None else int(kept[at])


def _nucleus(scaled: Floats, top_p: float) -> npt.NDArray[np.intp]:
    """The fewest likeliest tokens whose probabilities reach top_p (Holtzman et al. 2020, section 3.1), in order.

    Of equally likely tokens the first count as likelier.
    """
    ranked = np.sort(scaled)[::-1]
    weights = np.exp(ranked)
    ends = _block_ends(weights)
    target = top_p * ends[-1]
    block = int(np.searchsorted(ends, target))
    before = ends[block - 1] if block else 0.0
    inner = before + np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    last = min(block * BLOCK + int(np.searchsorted(inner, target)), len(ranked) - 1)
    least = ranked[last]
    inside = np.flatnonzero(scaled >= least)
    excess = len(inside) - last - 1
    if excess:
        equal = np.flatnonzero(scaled[inside] == least)
        inside = np.delete(inside, equal[len(equal) - excess :])
    return inside


def _invert(scaled: Floats, uniform: float) -> int:
    """The index whose part of the summed weights holds `uniform`."""
    weights = np.exp(scaled)
    ends = _block_ends(weights)
    target = min(uniform * ends[-1], np.nextafter(ends[-1], 0.0))
    block = int(np.searchsorted(ends, target, side="right"))
    start = block * BLOCK
    before = ends[block - 1] if block else 0.0
    inner = before + np.cumsum(weights[start : start + BLOCK], dtype=np.float64)
    at = start + int(np.searchsorted(inner, target, side="right"))
    if at < min(start + BLOCK, len(weights)):
        return at
    return start + int(np.flatnonzero(weights[start : start + BLOCK])[-1])  # both sums were rounded apart


def _block_ends(weights: Floats) -> npt.NDArray[np.float64]:
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
