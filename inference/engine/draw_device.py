"""Drawing tokens for many rows at once on an accelerator; the same distributions as `draw` gives on the host."""

from collections.abc import Sequence as Seq

import torch

from inference.engine.draw import uniforms
from scheduling.core.sequence import SamplingParams

FEW_TOKENS = 256
"""Likeliest tokens among which a nucleus is looked for first."""


def draw_rows(logits: torch.Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> list[int]:
    """A token for each row of logits [N, vocab], whose maxima are finite. See `draw.draw` for order and sources.

    In float64, so that rounding moves no boundary; a row's token does not depend on the other rows.
    """
    device = logits.device
    temperature = _column([p.temperature for p in params], device)
    scaled = (logits.double() - logits.max(-1, keepdim=True).values.double()) / temperature
    _cut_top_k(scaled, [p.top_k for p in params])
    probs = torch.softmax(scaled, -1)
    cut = [i for i, p in enumerate(params) if p.top_p < 1]
    if cut:
        probs[cut] = nucleus(probs[cut], _column([params[i].top_p for i in cut], device)[:, 0])
    if any(p.min_p > 0 for p in params):
        least = probs.max(-1, keepdim=True).values * _column([p.min_p for p in params], device)
        probs = torch.where(probs < least, 0.0, probs)
    total = probs.cumsum(-1)
    top = total[:, -1]
    uniform = torch.from_numpy(uniforms([p.seed for p in params], positions)).to(device)
    target = torch.minimum(uniform * top, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(total, target[:, None], right=True)[:, 0].clamp_max(logits.shape[1] - 1).tolist()


def _column(values: Seq[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _cut_top_k(scaled: torch.Tensor, top_k: Seq[int]) -> None:
    """Leave each row's top-k tokens and those equal to the last of them."""
    rows = [i for i, k in enumerate(top_k) if 0 < k < scaled.shape[1]]
    if not rows:
        return
    counts = torch.tensor([top_k[i] for i in rows], device=scaled.device)
    chosen = scaled[rows]
    ranked = chosen.topk(int(max(top_k[i] for i in rows)), sorted=True).values
    least = ranked.gather(-1, counts[:, None] - 1)
    scaled[rows] = torch.where(chosen < least, -torch.inf, chosen)


def nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the fewest likeliest tokens whose sum reaches top_p; of equally likely ones the first are kept.

    The nucleus is looked for among a few likeliest tokens; rows where it reaches further are sorted whole.
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
