"""The next token of every row at once; what is random depends on the row's seed and position only."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from scheduling.core.sequence import SamplingParams

NOT_FINITE = "The model's logits are not finite; this request cannot go on."
FEW_TOKENS = 256
"""Likeliest tokens among which a nucleus is looked for first."""
FEW_ELEMENTS = 1 << 20
"""Logits that one thread turns into tokens sooner than several would meet."""


def sample(logits: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> list[int | None]:
    """Choose a token per row of logits [N, vocab]; `positions` are those of the tokens to be made.

    A row that holds NaN or +inf gives None. Nothing depends on the other rows.
    """
    tokens, finite = _largest(logits)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0 and finite[i]]
    if drawn:
        uniform = uniforms([params[i].seed for i in drawn], [positions[i] for i in drawn])
        with _threads_for(len(drawn) * logits.shape[1]):
            for i, token in zip(drawn, _draw(logits, params, drawn, uniform), strict=True):
                tokens[i] = token
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def _largest(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Each row's likeliest token, the first of equals, and whether its logit is finite.

    NumPy on a CPU: torch would meet at a barrier of all its threads, which takes milliseconds where cores are shared.
    """
    if logits.device.type != "cpu":
        best, argmax = logits.max(-1)
        return argmax.tolist(), torch.isfinite(best).tolist()
    rows = logits.numpy()
    tokens = rows.argmax(-1)
    return tokens.tolist(), np.isfinite(rows[np.arange(len(rows)), tokens]).tolist()


@contextmanager
def _threads_for(num_elements: int) -> Iterator[None]:
    """One thread for torch's operations on few elements, for the same reason."""
    threads = torch.get_num_threads()
    if threads == 1 or num_elements >= FEW_ELEMENTS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def _draw(
    logits: torch.Tensor, params: Seq[SamplingParams], rows: list[int], uniform: npt.NDArray[np.float64]
) -> list[int]:
    """Inverse of the cumulative distribution in vocabulary order; float64, so that rounding moves no boundary."""
    device = logits.device
    temperature = torch.tensor([params[i].temperature for i in rows], dtype=torch.float64, device=device)
    chosen = logits[rows].double()
    chosen = (chosen - chosen.max(-1, keepdim=True).values) / temperature[:, None]
    probs = torch.softmax(chosen, -1)
    cut = [n for n, i in enumerate(rows) if params[i].top_p < 1]
    if cut:
        top_p = torch.tensor([params[rows[n]].top_p for n in cut], dtype=torch.float64, device=device)
        probs[cut] = _nucleus(probs[cut], top_p)
    total = probs.cumsum(-1)
    top = total[:, -1]
    target = torch.minimum(torch.from_numpy(uniform).to(device) * top, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(total, target[:, None], right=True)[:, 0].clamp_max(logits.shape[1] - 1).tolist()


def _nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the fewest likeliest tokens whose sum reaches top_p (Holtzman et al. 2020, section 3.1).

    Of equally likely tokens the first count as likelier. The nucleus is looked for among a few likeliest tokens; rows
    where it reaches further are sorted whole, which takes longer than a forward pass of a small model.
    """
    kept = torch.zeros_like(probs)
    few = min(FEW_TOKENS, probs.shape[1])
    order = probs.topk(few, sorted=False).indices.sort().values
    ranked, places = probs.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, places)
    before = ranked.cumsum(-1) - ranked
    last = ranked[:, -1:]
    whole = ((ranked > last) & (before >= top_p[:, None])).any(-1) | (few == probs.shape[1])
    ranked[before >= top_p[:, None]] = 0
    kept.scatter_(-1, order, ranked)
    rest = (~whole).nonzero()[:, 0]
    if len(rest):
        ranked, order = probs[rest].sort(dim=-1, descending=True, stable=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p[rest, None]] = 0
        kept[rest] = torch.zeros_like(probs[rest]).scatter_(-1, order, ranked)
    return kept
