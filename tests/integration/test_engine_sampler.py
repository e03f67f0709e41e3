"""Sampling depends on logits, seed and position of its own row only, and follows the distribution asked for."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from inference.engine import draw, draw_device
from inference.engine.draw import uniforms
from inference.engine.graphs import no_waiting
from inference.engine.sampler import Ask, Choice, Chosen, Sampler
from scheduling.core.sequence import SamplingParams, Sequence
from tests.integration.test_engine_parity import gpu, make_sequence

EOS = 2
PROBS = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.15, 0.1])
GREEDY = SamplingParams(temperature=0.0)


class DeviceSampler(Sampler):
    """Samples as it would on an accelerator."""

    def launch(self, logits: torch.Tensor, asks: Any) -> Chosen:
        return partial(self._finish, logits, asks, self._try_launch(logits, asks))


SAMPLERS = {"host": Sampler, "device": DeviceSampler}


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return SAMPLERS[request.param](frozenset({EOS}))


def row(params: SamplingParams, output: int = 0, prompt: list[int] | None = None) -> Sequence:
    """A sequence that has so many output tokens."""
    sequence = make_sequence("s", prompt or [0], 10_000, params)
    sequence.tokens += [0] * output
    return sequence


def choose(sampler: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> list[Choice]:
    return [choices[0] for choices in sampler.sample(logits.clone(), [Ask(s) for s in sequences])]


def tokens_of(sampler: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    choices = choose(sampler, logits, sequences)
    assert all(choice.error is None for choice in choices), choices
    return [choice.token_id for choice in choices]


def frequencies(sampler: Sampler, params: SamplingParams, count: int = 4000) -> torch.Tensor:
    """Of tokens over many positions."""
    logits = PROBS.log().expand(count, -1)
    tokens = tokens_of(sampler, logits, [row(params, output=i) for i in range(count)])
    return torch.bincount(torch.tensor(tokens), minlength=len(PROBS)) / count


def test_temperature_zero_takes_the_likeliest(sampler: Sampler) -> None:
    assert tokens_of(sampler, torch.randn(5, 30).sort(-1).values, [row(GREEDY)] * 5) == [29] * 5
    tiny = SamplingParams(temperature=1e-300, seed=5)
    assert tokens_of(sampler, torch.randn(5, 30).sort(-1).values, [row(tiny)] * 5) == [29] * 5


def test_frequencies_follow_the_distribution(sampler: Sampler) -> None:
    assert torch.allclose(frequencies(sampler, SamplingParams(seed=3)), PROBS, atol=0.03)


def test_temperature_sharpens_and_flattens(sampler: Sampler) -> None:
    expected = torch.softmax(PROBS.log() / 0.5, -1)
    assert torch.allclose(frequencies(sampler, SamplingParams(temperature=0.5, seed=3)), expected, atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 100}, [0, 1, 3, 4, 5]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.8}, [1, 3]),  # 0.4 and 0.3 are 0.82 of what top_k leaves
        ({"top_p": 0.8, "min_p": 0.5}, [1, 3]),
    ],
)
def test_cuts_leave_the_tokens_they_should(sampler: Sampler, params: dict[str, Any], kept: list[int]) -> None:
    found = frequencies(sampler, SamplingParams(seed=4, **params))
    assert found.nonzero()[:, 0].tolist() == kept
    assert torch.allclose(found[kept], PROBS[kept] / PROBS[kept].sum(), atol=0.03)


floats = st.floats(0.01, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), vocab=st.sampled_from([5, 127, 128, 129, 300, 1000]), spread=st.sampled_from([1, 4]),
    temperature=st.floats(0.1, 2.0), top_k=st.integers(0, 40), top_p=floats, min_p=st.floats(0.0, 0.5),
)  # fmt: skip
def test_what_can_be_drawn_is_what_transformers_leaves(
    seed: int, vocab: int, spread: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, vocab)).astype(np.float32)) * spread
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    ids: Any = torch.zeros((1, 1), dtype=torch.long)
    expected = torch.softmax(warpers(ids, logits.clone()).double(), -1)[0].numpy()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    many = np.linspace(0, 1, 400, endpoint=False)
    host = [draw.draw(logits[0].numpy(), float(logits.max()), params, u) for u in many]
    assert all(expected[token] > 0 for token in host)
    found = np.bincount(host, minlength=vocab) / len(many)  # `many` is even, so each token has its share to a step
    assert np.abs(found - expected).max() <= 1 / len(many) + 1e-5


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_token_does_not_depend_on_the_rows_around_it(data: st.DataObject) -> None:
    sampler = Sampler(frozenset({EOS}))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    params = st.builds(
        SamplingParams, temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]), top_p=st.sampled_from([0.3, 0.9, 1.0]),
        top_k=st.sampled_from([0, 1, 5, 50]), min_p=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 2**63 - 1),
        repetition_penalty=st.sampled_from([1.0, 1.3]), presence_penalty=st.sampled_from([0.0, 1.5]),
        frequency_penalty=st.sampled_from([0.0, -0.4]), logit_bias=st.sampled_from([(), ((3, 5.0), (9, -100.0))]),
        min_tokens=st.sampled_from([0, 30]), logprobs=st.sampled_from([None, 3]),
    )  # fmt: skip
    many = data.draw(st.lists(params, min_size=1, max_size=8))
    sequences = [row(p) for p in many]
    for sequence in sequences:
        sequence.tokens += rng.integers(0, 100, 20).tolist()
    logits = torch.from_numpy(rng.standard_normal((len(many), 100)).astype(np.float32)) * 3
    together = choose(sampler, logits, sequences)
    for i, sequence in enumerate(sequences):
        sequence.notes = None  # as after a resumption
        assert choose(sampler, logits[i : i + 1], [sequence]) == [together[i]]


def test_rows_that_are_not_finite_fail_alone(sampler: Sampler) -> None:
    logits = torch.zeros(4, 8)
    logits[1, 3], logits[2, 5] = math.nan, math.inf
    logits[0, 2] = logits[3, 2] = 9.0
    logits[3, 4] = -math.inf
    sampled = SamplingParams(temperature=0.01)
    choices = choose(sampler, logits, [row(p) for p in (GREEDY, sampled, GREEDY, sampled)])
    assert [c.token_id for c in choices if not c.error] == [2, 2]
    assert ["not finite" in (c.error or "") for c in choices] == [False, True, True, False]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_request_whose_sampling_raises_fails_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(frozenset())
    if kind == "device":
        monkeypatch.setattr(sampler, "_on_host", sampler._on_device)
        monkeypatch.setattr(Sampler, "sample", lambda self, logits, asks: self._one_by_one(logits, asks))
    poisoned = SamplingParams(temperature=0.0, logit_bias=((10**6, 5.0),))
    logits = torch.zeros(3, 8)
    logits[:, 5] = 1.0
    choices = choose(sampler, logits, [row(GREEDY), row(poisoned), row(GREEDY)])
    assert [c.token_id for c in choices] == [5, -1, 5]
    assert "(IndexError)" in (choices[1].error or "")


def processors_of(params: SamplingParams) -> Any:
    """What transformers would put before its warpers."""
    processors = transformers.LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    return processors


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), repetition=st.sampled_from([0.8, 1.0, 1.5]), output=st.integers(0, 130),
    frequency=st.sampled_from([-1.0, 0.0, 0.7]), presence=st.sampled_from([-1.0, 0.0, 0.6]),
    bias=st.sampled_from([(), ((4, 2.0), (7, -3.0))]),
)  # fmt: skip
def test_penalties_kept_up_token_by_token_are_what_their_definitions_give(
    seed: int, repetition: float, frequency: float, presence: float, bias: tuple[tuple[int, float], ...], output: int
) -> None:
    rng = np.random.default_rng(seed)
    params = SamplingParams(
        temperature=0.0, repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence,
        logit_bias=bias,
    )  # fmt: skip
    samplers = [SAMPLERS[kind](frozenset()) for kind in SAMPLERS]
    prompt = rng.integers(0, 200, 30).tolist()
    kept_up = [row(params, prompt=prompt) for _ in samplers]
    for step in range(output):
        for sampler, sequence in zip(samplers, kept_up, strict=True):
            if step % 7 != 3:  # some steps bring several tokens
                choose(sampler, torch.zeros(1, 300), [sequence])
            sequence.tokens.append(
                int(rng.integers(0, 40 + 2 * step) if sequence is kept_up[0] else kept_up[0].tokens[-1])
            )
    logits = torch.from_numpy(rng.standard_normal((1, 300)).astype(np.float32)) * 2
    counts = torch.bincount(torch.tensor([*kept_up[0].tokens[30:]], dtype=torch.long), minlength=300)
    expected = logits.clone()
    for token_id, amount in bias:
        expected[0, token_id] += amount
    expected = processors_of(params)(torch.tensor([kept_up[0].tokens]), expected)
    expected -= frequency * counts + presence * (counts > 0)
    for sampler, sequence in zip(samplers, kept_up, strict=True):
        assert tokens_of(sampler, logits, [sequence]) == [int(expected.argmax())]


def test_no_end_before_min_tokens(sampler: Sampler) -> None:
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(5,))
    logits = torch.tensor([[0.0, 1.0, 9.0, 2.0, 0.0, 8.0]])
    assert [tokens_of(sampler, logits, [row(params, output=n)])[0] for n in range(5)] == [3, 3, 3, 2, 2]
    endless = SamplingParams(temperature=0.0, min_tokens=3, ignore_eos=True)
    assert tokens_of(sampler, logits, [row(endless)]) == [2]


def test_log_probabilities_are_the_model_s_own(sampler: Sampler) -> None:
    logits = torch.randn(2, 50) * 3
    params = SamplingParams(temperature=0.4, top_k=2, presence_penalty=2.0, logit_bias=((7, 50.0),), logprobs=4)
    biased, plain = choose(sampler, logits, [row(params), row(SamplingParams(temperature=0.0, logprobs=0))])
    expected = torch.log_softmax(logits.double(), -1)
    assert biased.token_id == 7
    assert biased.logprob is not None
    assert biased.logprob.logprob == pytest.approx(float(expected[0, 7]), abs=1e-5)
    best = expected[0].topk(4)
    assert [token_id for token_id, _ in biased.logprob.top] == best.indices.tolist()
    assert [value for _, value in biased.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert plain.logprob is not None
    assert plain.logprob.top == ()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_draft_changes_no_token(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(SAMPLERS)))
    sampler = SAMPLERS[kind](frozenset())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    params = SamplingParams(temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=9, logprobs=2)
    logits = torch.from_numpy(rng.standard_normal((5, 6)).astype(np.float32)) * 2
    without: list[Choice] = []
    sequence = row(params)
    for i in range(5):
        without += choose(sampler, logits[i : i + 1], [sequence])
        sequence.tokens.append(without[-1].token_id)
    right = data.draw(st.integers(0, 4))
    draft = [choice.token_id for choice in without[:4]]
    if right < 4:
        draft[right] = (draft[right] + 1) % 6
    other = row(SamplingParams(temperature=0.0))
    answers = sampler.sample(
        torch.cat([logits[:1], logits, logits[:1]]), [Ask(other), Ask(row(params), tuple(draft)), Ask(other)]
    )
    assert answers[1] == without[: right + 1]
    assert answers[0] == answers[2]


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
    descending, order = probs.sort(dim=-1, descending=True, stable=True)
    descending[descending.cumsum(-1) - descending >= top_p[:, None]] = 0
    expected = torch.zeros_like(probs).scatter_(-1, order, descending)
    for i in range(32):
        kept = expected[i].nonzero()[:, 0].tolist()
        ranked = np.sort(np.exp((logits[i] - logits[i].max()).numpy()))
        assert len(ranked) - draw.count_outside(ranked, draw.block_ends(ranked), float(top_p[i])) == len(kept)
        params = SamplingParams(top_p=float(top_p[i]))
        tokens = [draw.draw(logits[i].numpy(), float(logits[i].max()), params, u) for u in np.linspace(0, 1, 30)[:-1]]
        assert set(tokens) <= set(kept)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu), "cpu"])
@pytest.mark.parametrize("vocab", [5, 300, 3000])
def test_a_device_chooses_what_the_host_chooses(vocab: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, for rows together."""
    monkeypatch.setattr(draw_device, "ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(vocab)
    sequences = [row(params_of(rng, seed), output=3, prompt=[1, 2, 3, 4]) for seed in range(300)]
    logits = torch.from_numpy(rng.standard_normal((len(sequences), vocab)).astype(np.float32)) * 3
    logits[::3] = logits[::3].round(decimals=1)  # many are alike
    logits[5, 2], logits[50, 3] = math.nan, math.inf
    host = choose(Sampler(frozenset({EOS})), logits, sequences)
    for sequence in sequences:
        sequence.notes = None
    found = choose(DeviceSampler(frozenset({EOS})), logits.to(device), sequences)
    assert sum(choice.error is not None for choice in host) == 2
    for ours, theirs in zip(found, host, strict=True):
        assert (ours.token_id, ours.error) == (theirs.token_id, theirs.error)
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None and theirs.logprob is not None:
            assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-5)
            assert [i for i, _ in ours.logprob.top] == [i for i, _ in theirs.logprob.top]
            assert [p for _, p in ours.logprob.top] == pytest.approx([p for _, p in theirs.logprob.top], abs=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("decimals", [1, 9])
def test_a_device_draws_from_a_nucleus_of_any_size_what_sorting_all_tokens_gives(spread: float, decimals: int) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(200, 2000, generator=generator) * spread).round(decimals=decimals)
    top_p, min_p, uniform = (torch.rand(200, generator=generator, dtype=torch.float64) for _ in range(3))
    min_p = (min_p * 0.02 * (min_p < 0.5)).float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    sums = ranked.double().cumsum(-1)
    kept = (sums - ranked < (top_p * sums[:, -1])[:, None]) & (ranked >= min_p[:, None])
    num_kept = kept.sum(-1, keepdim=True)
    assert spread > 2 or int(num_kept.max()) > 256, "what one look at the likeliest would not reach"
    place = torch.searchsorted(sums, sums.gather(-1, num_kept - 1) * (1 - uniform[:, None]))
    found = draw_device._draw_ranked(weights.clone(), top_p, min_p, uniform)
    assert found.tolist() == order.gather(-1, place)[:, 0].tolist()


class Launched(TorchDispatchMode):
    """Notes what a device is given to do, and what of it has the host wait for the device."""

    READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name != "detach":  # which a view in NumPy is
            self.launched.append(name)
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1] or ()
        )
        if name in self.READS or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu), "cpu"])
def test_whatever_is_asked_for_is_launched_at_once_and_waited_for_once(device: str) -> None:
    rng = np.random.default_rng(1)
    sequences = [row(params_of(rng, seed), output=3, prompt=[1, 2, 3, 4]) for seed in range(100)]
    logits = torch.from_numpy(rng.standard_normal((len(sequences), 2000)).astype(np.float32))
    asks, sampler, launch = [Ask(s) for s in sequences], Sampler(frozenset({EOS})), Launched()
    there = logits.to(device)
    with launch, no_waiting() if device == "cuda" else nullcontext():
        wait = sampler._on_device(there, asks)
    assert launch.launched
    assert launch.waits == []
    num_launched = len(launch.launched)
    with launch:
        found = wait()
    assert len(launch.launched) == num_launched, "nuclei of more than a thousand tokens ask for nothing more"
    for sequence in sequences:
        sequence.notes = None
    assert [c.token_id for (c,) in found] == [c.token_id for c in choose(sampler, logits, sequences)]


def params_of(rng: np.random.Generator, seed: int) -> SamplingParams:
    """Anything that a request may ask for."""

    def one(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    return SamplingParams(
        temperature=one(0.0, 0.3, 1.0, 2.0), top_p=one(0.3, 0.9, 0.99, 1.0, 1.0), top_k=one(0, 0, 1, 5, 50),
        min_p=one(0.0, 0.0, 0.1), seed=seed, repetition_penalty=one(1.0, 1.0, 1.3), logprobs=one(None, 0, 3),
        presence_penalty=one(0.0, 1.5), frequency_penalty=one(0.0, -0.4), logit_bias=one((), ((3, 5.0), (4, -100.0))),
        min_tokens=one(0, 30), ignore_eos=one(True, False),
    )  # fmt: skip
