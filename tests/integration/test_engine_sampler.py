"""Sampling depends on logits, seed and position of its own row only, and follows the distribution."""

import math

import numpy as np
import pytest
import torch

from inference.engine import sampler
from inference.engine.sampler import sample, uniforms
from scheduling.core.sequence import SamplingParams

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.15, 0.1])
GREEDY = SamplingParams(temperature=0.0)


def draw_many(params: SamplingParams, count: int = 4000) -> torch.Tensor:
    """Frequencies of tokens over many positions."""
    logits = PROBS.log().expand(count, -1)
    tokens = sample(logits, [params] * count, list(range(count)))
    return torch.bincount(torch.tensor(tokens), minlength=len(PROBS)) / count


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(torch.randn(5, 30).sort(-1).values, [GREEDY] * 5, [0] * 5) == [29] * 5


def test_frequencies_follow_the_distribution() -> None:
    assert torch.allclose(draw_many(SamplingParams(seed=3)), PROBS, atol=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    expected = torch.softmax(PROBS.log() / 0.5, -1)
    assert torch.allclose(draw_many(SamplingParams(temperature=0.5, seed=3)), expected, atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.39, [1]), (0.41, [1, 3]), (0.8, [1, 3, 4]), (1e-9, [1])])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[int]) -> None:
    frequencies = draw_many(SamplingParams(top_p=top_p, seed=4))
    assert frequencies.nonzero()[:, 0].tolist() == kept
    assert torch.allclose(frequencies[kept], PROBS[kept] / PROBS[kept].sum(), atol=0.03)


def test_a_token_does_not_depend_on_the_rows_around_it() -> None:
    logits = torch.randn(40, 100)
    params = [SamplingParams(temperature=0.5 + i / 20, top_p=1 - i / 80, seed=i) for i in range(40)]
    together = sample(logits, params, list(range(40)))
    alone = [sample(logits[i : i + 1], [params[i]], [i])[0] for i in range(40)]
    assert together == alone
    assert len(set(together)) > 10


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = torch.zeros(4, 8)
    logits[1, 3], logits[2, 5] = math.nan, math.inf
    logits[0, 2] = logits[3, 2] = 9.0
    logits[3, 4] = -math.inf
    sampled = SamplingParams(temperature=0.01)
    assert sample(logits, [GREEDY, sampled, GREEDY, sampled], [1, 2, 3, 4]) == [2, None, None, 2]


def test_random_numbers_are_uniform_and_differ_by_seed_and_position() -> None:
    many = uniforms(list(range(200)) * 50, [p for p in range(50) for _ in range(200)])
    assert len(np.unique(many)) == len(many)
    assert abs(many.mean() - 0.5) < 0.01
    assert ((many >= 0) & (many < 1)).all()
    assert np.histogram(many, 10, (0, 1))[0].min() > 850
    assert abs(np.corrcoef(uniforms([1] * 999, range(999)), uniforms([2] * 999, range(999)))[0, 1]) < 0.1


def test_seeds_of_any_size_are_taken() -> None:
    assert uniforms([-1, 2**70 + 5], [0, 0]).tolist() == uniforms([2**64 - 1, 5], [0, 0]).tolist()


@pytest.mark.parametrize("spread", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("vocab", [5, 300, 4096])
def test_a_nucleus_is_what_sorting_all_tokens_gives(vocab: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(32, vocab, generator=generator) * spread).round(decimals=1)  # rounded: many are alike
    probs = torch.softmax(logits.double(), -1)
    top_p = torch.rand(32, generator=generator).double()
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p[:, None]] = 0
    assert torch.equal(sampler._nucleus(probs, top_p), torch.zeros_like(probs).scatter_(-1, order, ranked))
