"""The step-time model finds the true cost, stays non-negative, shrugs off hiccups, follows change, and is a file."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.sequence import SamplingParams, Sequence, StepPart
from scheduling.core.sizing.cost_model import (
    DEFAULT_COST,
    CostFileError,
    StepCost,
    StepFeatures,
    StepTimeModel,
    SwapLink,
    cheaper_preemption,
    measure_parts,
)
from scheduling.core.sizing.least_squares import RecursiveLeastSquares, solve_nonnegative


def draw_step(random: Random) -> StepFeatures:
    """A mixed step: some decodes, often a prefill chunk."""
    decodes = random.randint(0, 64)
    chunk = random.choice([0, 0, random.randint(1, 2048)])
    return StepFeatures(1, chunk, decodes, decodes * random.randint(16, 3000), chunk * random.randint(1, 3000))


def sequence_at(num_tokens: int, num_computed: int, num_prompt: int) -> Sequence:
    return Sequence(
        id="s",
        attempt=1,
        tenant="t",
        priority=3,
        arrival_s=0.0,
        tokens=[1] * num_tokens,
        num_prompt_tokens=num_prompt,
        max_tokens=100,
        sampling=SamplingParams(),
        num_computed=num_computed,
    )


def assert_close(cost: StepCost, expected: StepCost, tolerance: float, seed: int = 5) -> None:
    random = Random(seed)
    for _ in range(50):
        step = draw_step(random)
        assert cost.price(step) == pytest.approx(expected.price(step), rel=tolerance)


def scaled(cost: StepCost, factor: float) -> StepCost:
    return StepCost(**{name: factor * getattr(cost, name) for name in cost.__dataclass_fields__})


def test_parts_are_measured_as_decodes_and_prefill_chunks() -> None:
    parts = [
        StepPart(sequence_at(11, 10, 8), 1, samples=True),
        StepPart(sequence_at(100, 0, 100), 40, samples=False),
        StepPart(sequence_at(100, 40, 100), 60, samples=True),
        StepPart(sequence_at(1, 0, 1), 1, samples=True),
    ]
    pairs = 40 * 41 // 2 + (60 * 40 + 60 * 61 // 2) + 1
    assert measure_parts(parts) == StepFeatures(1, 101, 1, 11, pairs)
    assert DEFAULT_COST.predict(parts) == DEFAULT_COST.price(measure_parts(parts))


def test_the_true_cost_is_found_from_noisy_steps() -> None:
    random, model = Random(1), StepTimeModel()
    for _ in range(1000):
        step = draw_step(random)
        model.observe(step, DEFAULT_COST.price(step) * random.uniform(0.95, 1.05))
    assert_close(model.cost, DEFAULT_COST, 0.03)
    assert model.num_observations == 1000
    assert 0 < model.typical_error_s < 0.003


def test_hiccups_move_the_model_little_and_its_mean_cost_by_what_they_took() -> None:
    random, model = Random(2), StepTimeModel()
    for number in range(1500):
        step = draw_step(random)
        seconds = DEFAULT_COST.price(step) * random.uniform(0.98, 1.02)
        model.observe(step, seconds + (2.0 if number % 50 == 49 else 0.0))
    assert_close(model.cost, DEFAULT_COST, 0.1)
    mean_s = sum(DEFAULT_COST.price(draw_step(random)) for _ in range(500)) / 500
    assert_close(model.mean_cost, scaled(DEFAULT_COST, 1 + 2.0 / 50 / mean_s), 0.2)


def test_one_observation_in_twenty_that_is_far_off_hardly_moves_the_fit() -> None:
    random, fit = Random(7), RecursiveLeastSquares([1.0])
    for number in range(1000):
        x = random.uniform(1, 10)
        fit.observe([x], 2 * x * random.uniform(0.98, 1.02) + (50.0 if number % 20 == 19 else 0.0))
    assert fit.coefficients[0] == pytest.approx(2, rel=0.05)


def test_a_change_of_the_engine_is_followed() -> None:
    random, model = Random(3), StepTimeModel(forgetting=0.98)
    slower = StepCost(step_s=0.02, prefill_token_s=90e-6, decode_sequence_s=2e-4, context_token_s=2e-7)
    for number in range(2000):
        step = draw_step(random)
        model.observe(step, (DEFAULT_COST if number < 1000 else slower).price(step))
    assert_close(model.cost, slower, 0.03)


def test_what_the_load_says_nothing_about_is_not_forgotten() -> None:
    random, model = Random(4), StepTimeModel(forgetting=0.95)
    for _ in range(500):
        step = draw_step(random)
        model.observe(step, DEFAULT_COST.price(step))
    decode_only = StepFeatures(1, 0, 16, 16_000, 0)
    for _ in range(2000):
        model.observe(decode_only, DEFAULT_COST.price(decode_only))
    assert_close(model.cost, DEFAULT_COST, 0.02)


def test_an_initial_cost_holds_until_measured_otherwise() -> None:
    model = StepTimeModel(DEFAULT_COST, confidence=0.1)
    assert_close(model.cost, DEFAULT_COST, 1e-9)
    with pytest.raises(ValueError, match="no time"):
        StepTimeModel().cost  # noqa: B018


def test_seconds_of_history_teach_the_same_as_steps() -> None:
    random, model = Random(6), StepTimeModel()
    for _ in range(600):
        steps = [draw_step(random) for _ in range(random.randint(1, 40))]
        total = StepFeatures(*(sum(values) for values in zip(*steps, strict=True)))
        model.observe(total, sum(DEFAULT_COST.price(step) for step in steps))
    assert_close(model.cost, DEFAULT_COST, 0.01)


def test_short_steps_are_told_by_themselves_however_much_the_long_ones_vary() -> None:
    random = Random(3)
    cost = StepCost(step_s=8e-4, prefill_token_s=8e-5, decode_sequence_s=2e-4, context_token_s=0.0)
    model = StepTimeModel()
    for _ in range(3000):
        decodes = random.randint(1, 16)
        chunk = random.randint(16, 256) if random.random() < 0.3 else 0
        step = StepFeatures(1, chunk, decodes, 150 * decodes, chunk * chunk // 2)
        # No line fits the long ones: a chunk beside many decodes takes longer.
        slow = random.uniform(0.8, 1.2) * (1 + decodes / 32) if chunk else 1.0
        model.observe(step, slow * cost.price(step))
    for decodes in (1, 4, 16):
        step = StepFeatures(1, 0, decodes, 150 * decodes, 0)
        assert model.cost.price(step) == pytest.approx(cost.price(step), rel=0.15)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 4096), st.integers(0, 512), st.integers(0, 10**6), st.floats(0, 10)), max_size=40
    )
)
def test_no_coefficient_is_ever_negative_or_infinite(steps: list[tuple[int, int, int, float]]) -> None:
    model = StepTimeModel(DEFAULT_COST, forgetting=0.9)
    for prefill, decodes, context, seconds in steps:
        model.observe(StepFeatures(1, prefill, decodes, context, prefill * prefill // 2), seconds)
    coefficients = model._fit.coefficients
    assert all(0 <= value < float("inf") for value in coefficients)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=3, max_size=8),
    vector=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    others=st.lists(st.lists(st.floats(0, 3), min_size=3, max_size=3), min_size=1, max_size=10),
)
def test_no_other_nonnegative_point_is_better(
    rows: list[list[float]], vector: list[float], others: list[list[float]]
) -> None:
    matrix = [[sum(r[i] * r[j] for r in rows) + (0.1 if i == j else 0) for j in range(3)] for i in range(3)]

    def value(w: list[float]) -> float:
        quadratic = sum(w[i] * matrix[i][j] * w[j] for i in range(3) for j in range(3))
        return quadratic / 2 - sum(v * x for v, x in zip(vector, w, strict=True))

    solution = solve_nonnegative(matrix, vector)
    assert min(solution) >= 0
    assert all(value(solution) <= value(other) + 1e-9 for other in others)


def test_a_cost_file_gives_the_same_cost_back(tmp_path: Path) -> None:
    DEFAULT_COST.save(tmp_path / "cost.json")
    assert StepCost.load(tmp_path / "cost.json") == DEFAULT_COST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "does not say"),
        ('{"format": "penstock-step-cost-1", "step_s": 1}', "missing"),
        (
            '{"format": "penstock-step-cost-1", "step_s": -1, "prefill_token_s": 1, '
            '"decode_sequence_s": 1, "context_token_s": 1}',
            "step_s must be",
        ),
    ],
)
def test_a_broken_cost_file_is_refused_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(CostFileError, match=message):
        StepCost.load(tmp_path / "cost.json")
    with pytest.raises(CostFileError, match="cannot be read"):
        StepCost.load(tmp_path / "absent.json")


def test_preemption_swaps_only_where_that_is_cheaper() -> None:
    fast, slow = SwapLink(bytes_per_s=20e9), SwapLink(bytes_per_s=1e9)
    assert cheaper_preemption(DEFAULT_COST, fast, num_tokens=4000, kv_bytes_per_token=131_072) == "swap"
    assert cheaper_preemption(DEFAULT_COST, slow, num_tokens=4000, kv_bytes_per_token=131_072) == "recompute"
    assert cheaper_preemption(DEFAULT_COST, fast, num_tokens=1, kv_bytes_per_token=131_072) == "recompute"
    assert cheaper_preemption(DEFAULT_COST, None, num_tokens=4000, kv_bytes_per_token=131_072) == "recompute"
    # Out and back in: where one way alone takes three quarters of the time, computing is sooner done.
    tight = SwapLink(bytes_per_s=4000 * 131_072 / (0.75 * DEFAULT_COST.recompute_s(4000)), latency_s=0.0)
    assert cheaper_preemption(DEFAULT_COST, tight, num_tokens=4000, kv_bytes_per_token=131_072) == "recompute"


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="forgetting"):
        RecursiveLeastSquares([1.0], forgetting=0.0)
    with pytest.raises(ValueError, match="positive"):
        RecursiveLeastSquares([0.0])
    with pytest.raises(ValueError, match="finite"):
        StepTimeModel().observe(StepFeatures(1, 1, 1, 1, 1), float("nan"))
