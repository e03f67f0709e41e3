"""Sizing: memory has the last word, latency steers as promised, and the learning controller finds the best size."""

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.sizing.controller import Controller, Observation, Readings
from scheduling.core.sizing.cost_model import DEFAULT_COST, StepCost
from scheduling.core.sizing.strategies import SIZINGS, InvalidSizingParameter, UnknownSizing, build_sizing

BUSY = Observation(
    now_s=0.0, seconds=1.0, steps=50, num_running=16, num_waiting=40, kv_blocks_used=160, kv_blocks_total=4096
)

observations = st.builds(
    Observation,
    now_s=st.floats(0, 1e9),
    seconds=st.floats(0, 10),
    steps=st.integers(0, 1000),
    step_s=st.floats(0, 5),
    tokens=st.integers(0, 10**6),
    good_tokens=st.integers(0, 10**6),
    num_running=st.integers(0, 300),
    num_waiting=st.integers(0, 10**6),
    p99_s=st.none() | st.floats(0, 1e4),
    target_s=st.none() | st.floats(0, 100),
    preemptions=st.integers(0, 50),
    kv_blocks_used=st.integers(0, 500),
    kv_blocks_total=st.integers(1, 2000),
    memory_batch_limit=st.none() | st.integers(0, 400),
    cost=st.none() | st.just(DEFAULT_COST),
    mean_context_tokens=st.floats(0, 1e5),
    telemetry=st.none()
    | st.builds(
        Readings,
        utilization_percent=st.none() | st.floats(0, 100),
        memory_free_bytes=st.none() | st.integers(0, 2**40),
        temperature_c=st.none() | st.floats(0, 120),
        power_w=st.none() | st.floats(0, 900),
        throttled=st.booleans(),
    ),
)


def settle(controller: Controller, observation: Observation, periods: int = 200) -> int:
    """Feed the same situation, with the batch always full, until the controller rests."""
    for _ in range(periods):
        size = controller.decide().batch_size
        controller.observe(replace(observation, num_running=size, kv_blocks_used=10 * size))
    return controller.decide().batch_size


@pytest.mark.parametrize("name", SIZINGS)
@settings(max_examples=25, deadline=None)
@given(periods=st.lists(observations, min_size=1, max_size=15), seed=st.integers(0, 9))
def test_no_size_is_chosen_that_memory_or_the_bounds_forbid(name: str, periods: list[Observation], seed: int) -> None:
    params = {"initial": 200} if name == "fixed" else {"largest": 128, "smallest": 2, "initial": 100}
    controller = build_sizing(name, params, random=Random(seed))
    for observation in periods:
        controller.observe(observation)
        size, reason = controller.decide()
        assert size == 1 or fits(size, observation)
        assert name == "fixed" or size <= 128
        assert size >= 2 or not fits(2, observation) or name == "fixed"
        assert reason


def fits(size: int, seen: Observation) -> bool:
    """Whether so many have memory: as the memory model says, and each with as many blocks as those that run."""
    blocks_each = math.ceil(seen.kv_blocks_used / seen.num_running) if seen.num_running else 0
    allowed = size if seen.memory_batch_limit is None else seen.memory_batch_limit
    return size <= allowed and size * max(1, blocks_each) <= seen.kv_blocks_total


STRAINED = [
    Readings(throttled=True),
    Readings(temperature_c=91.0),
    Readings(power_w=701.0),
    Readings(memory_free_bytes=2**20, utilization_percent=5.0),
]


@pytest.mark.parametrize("strained", STRAINED, ids=["throttled", "hot", "power", "memory"])
@pytest.mark.parametrize("name", sorted(SIZINGS.keys() - {"fixed"}))
@settings(max_examples=8, deadline=None)
@given(periods=st.lists(observations, min_size=2, max_size=8))
def test_a_strained_device_never_gets_a_larger_batch(name: str, strained: Readings, periods: list[Observation]) -> None:
    controller = build_sizing(name, {"power_w": 700.0}, random=Random(1))
    for observation in periods:
        before = controller.decide().batch_size
        controller.observe(replace(observation, telemetry=strained))
        assert controller.decide().batch_size <= before


@pytest.mark.parametrize("name", sorted(SIZINGS.keys() - {"fixed", "adaptive"}))
def test_a_device_at_ease_gets_what_waits_and_the_reason_names_the_strain_otherwise(name: str) -> None:
    calm = Readings(utilization_percent=90.0, memory_free_bytes=2**34, temperature_c=60.0, power_w=300.0)
    wanting = replace(BUSY, p99_s=0.5, target_s=1.0)
    for device, word in (
        (calm, ""), (replace(calm, temperature_c=95.0), "95 degrees"), (replace(calm, throttled=True), "throttles"),
        (replace(calm, memory_free_bytes=2**22), "4 MB"),
    ):  # fmt: skip
        controller = build_sizing(name)
        controller.observe(replace(wanting, telemetry=device))
        size, reason = controller.decide()
        assert (size > 16) == (word == "")
        assert word in reason


def test_throughput_first_grows_faster_where_the_device_waits_for_its_host() -> None:
    sizes = []
    for percent in (95.0, 30.0):
        controller = build_sizing("throughput_first")
        controller.observe(replace(BUSY, telemetry=Readings(utilization_percent=percent)))
        sizes.append(controller.size)
    assert sizes == [20, 24]


@pytest.mark.parametrize("name", SIZINGS)
def test_the_same_seed_and_history_give_the_same_decisions(name: str) -> None:
    random, runs = Random(2), []
    history = [replace(BUSY, p99_s=random.uniform(0.1, 3), target_s=1.0, good_tokens=random.randint(0, 99))] * 100
    for _ in range(2):
        controller = build_sizing(name, random=Random(7))
        decisions = []
        for observation in history:
            controller.observe(observation)
            decisions.append(controller.decide())
        runs.append(decisions)
    assert runs[0] == runs[1]


def test_latency_first_shrinks_at_once_above_120_percent_and_grows_slowly_below_70() -> None:
    controller = build_sizing("latency_first", {"initial": 16})
    controller.observe(replace(BUSY, p99_s=1.19, target_s=1.0))
    assert controller.size == 16
    controller.observe(replace(BUSY, p99_s=1.21, target_s=1.0))
    assert controller.size == 12
    controller.observe(replace(BUSY, p99_s=0.69, target_s=1.0))
    assert controller.size == 13
    controller.observe(replace(BUSY, p99_s=0.71, target_s=1.0))
    assert controller.size == 13
    controller.observe(replace(BUSY, p99_s=0.1, target_s=1.0, num_waiting=0))
    assert controller.size == 13, "what nobody waits for does not grow"


def test_latency_first_gets_down_to_one() -> None:
    assert settle(build_sizing("latency_first"), replace(BUSY, p99_s=9.0, target_s=1.0)) == 1


def test_throughput_first_grows_until_more_no_longer_pays() -> None:
    flat = StepCost(step_s=0.02, prefill_token_s=1e-5, decode_sequence_s=1e-6, context_token_s=0)
    steep = StepCost(step_s=0.0002, prefill_token_s=1e-5, decode_sequence_s=0.001, context_token_s=0)
    assert settle(build_sizing("throughput_first"), replace(BUSY, cost=flat)) == 256
    assert settle(build_sizing("throughput_first", {"initial": 1}), replace(BUSY, cost=steep)) < 8


@pytest.mark.parametrize("name", ["throughput_first", "balanced", "memory_efficient"])
def test_nothing_grows_while_nobody_waits(name: str) -> None:
    idle = replace(BUSY, num_waiting=0, p99_s=0.1, target_s=1.0)
    assert settle(build_sizing(name, {"initial": 8}), idle) <= 8


def test_balanced_comes_to_rest_near_the_target() -> None:
    controller = build_sizing("balanced", {"initial": 4})
    for _ in range(100):
        size = controller.size
        controller.observe(replace(BUSY, num_running=size, kv_blocks_used=size, p99_s=size / 60, target_s=1.0))
    assert 50 <= controller.size <= 66


FULL = replace(BUSY, kv_blocks_used=4000, preemptions=2)
"""The KV cache is full, and sequences lose their blocks to each other."""


@pytest.mark.parametrize("name", ["throughput_first", "balanced", "memory_efficient"])
def test_a_full_kv_cache_gets_no_larger_batch(name: str) -> None:
    for p99_s in (None, 0.1):
        controller = build_sizing(name)
        for _ in range(5):
            before = controller.size
            blocks = FULL.kv_blocks_total - 60
            controller.observe(replace(FULL, num_running=before, kv_blocks_used=blocks, p99_s=p99_s, target_s=1.0))
            assert controller.size <= before
        assert (controller.size < 16) == (name != "balanced"), "there is no target that a larger batch would miss"


def test_balanced_leaves_the_rest_of_a_nearly_full_kv_cache_to_those_that_run() -> None:
    nearly = replace(BUSY, num_running=200, kv_blocks_used=3800, kv_blocks_total=4000)
    for p99_s in (None, 0.1):
        controller = build_sizing("balanced", {"initial": 200})
        controller.observe(replace(nearly, p99_s=p99_s, target_s=1.0))
        assert controller.size == 200, "memory would allow ten more"
        controller.observe(replace(nearly, p99_s=p99_s, target_s=1.0, kv_blocks_used=1800))
        assert controller.size > 200


def test_memory_efficient_gives_back_what_the_load_does_not_need() -> None:
    controller = build_sizing("memory_efficient", {"initial": 64})
    for _ in range(60):
        controller.observe(replace(BUSY, num_running=5, num_waiting=0, kv_blocks_used=50))
    assert 5 <= controller.size <= 11
    over = build_sizing("memory_efficient", {"initial": 16, "kv_line": 0.5})
    over.observe(replace(BUSY, num_running=16, num_waiting=0, kv_blocks_used=2100))
    assert over.size < 16, "over its line, though nobody was preempted"


def test_memory_efficient_holds_kv_use_below_its_line() -> None:
    controller = build_sizing("memory_efficient", {"initial": 16, "kv_line": 0.8})
    for _ in range(100):
        size = controller.size
        controller.observe(replace(BUSY, num_running=size, kv_blocks_used=40 * size))
    assert 0.65 <= 40 * controller.size / BUSY.kv_blocks_total <= 0.8
    controller.observe(replace(BUSY, num_running=3, num_waiting=0, kv_blocks_used=120))
    assert controller.size * 40 < 0.8 * BUSY.kv_blocks_total


def goodput(size: int, best: int) -> float:
    """Tokens a second: more with size up to `best`; beyond, the SLA is missed and little of it counts."""
    return 100.0 * size if size <= best else 20.0 * best


def drive(controller: Controller, random: Random, best: int, periods: int) -> list[int]:
    sizes = []
    for _ in range(periods):
        size = controller.size
        sizes.append(size)
        good = max(0, round(goodput(size, best) * random.uniform(0.8, 1.2)))
        controller.observe(replace(BUSY, num_running=size, kv_blocks_used=size, good_tokens=good))
    return sizes


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_finds_the_size_of_most_goodput_and_follows_a_change(seed: int) -> None:
    controller = build_sizing("adaptive", {"largest": 128}, random=Random(seed))
    random = Random(100 + seed)
    for best in (66, 16):
        late = drive(controller, random, best, 2400)[-800:]
        reached = sum(goodput(size, best) for size in late) / len(late)
        assert reached > 0.7 * goodput(best, best)


def test_adaptive_learns_nothing_from_idle_periods() -> None:
    controller = build_sizing("adaptive", random=Random(1))
    for _ in range(50):
        controller.observe(replace(BUSY, num_waiting=0, num_running=0, kv_blocks_used=0, good_tokens=7))
    assert all(arm.weight == 0 for arm in controller._arms)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("fixed", {"initial": 0}, "initial must be a number from 1 to 4096"),
        ("fixed", {"largest": 3}, "no parameter 'largest'"),
        ("balanced", {"gain": float("nan")}, "gain must be a number"),
        ("balanced", {"smallest": 9, "largest": 3}, "smallest is above largest"),
        ("balanced", {"initial": 9, "largest": 3}, "between smallest and largest"),
    ],
)
def test_bad_parameters_are_named(name: str, params: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidSizingParameter, match=message):
        build_sizing(name, params)


def test_an_unknown_strategy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownSizing, match="adaptive, balanced, fixed, gradient, latency_first"):
        build_sizing("best")


def test_adaptive_judges_a_size_only_once_the_batch_has_it() -> None:
    controller = build_sizing("adaptive", {"initial": 16, "dwell": 1}, random=Random(1))
    controller.observe(replace(BUSY, num_running=64, good_tokens=5000))
    assert controller.size == 16
    assert all(arm.weight == 0 for arm in controller._arms), "the tokens are those of a larger batch"  # type: ignore[attr-defined]
    controller.observe(replace(BUSY, num_running=16, good_tokens=100))
    (tried,) = (arm for arm in controller._arms if arm.weight)  # type: ignore[attr-defined]
    assert (tried.size, tried.total) == (16, 100.0)


def test_adaptive_expects_of_untried_sizes_what_the_step_cost_promises() -> None:
    controller = build_sizing("adaptive", {"dwell": 1}, random=Random(1))
    controller.observe(replace(BUSY, num_running=16, good_tokens=100, cost=DEFAULT_COST))
    promises = [arm.promise for arm in controller._arms]  # type: ignore[attr-defined]
    assert promises == sorted(promises)
    assert promises[0] < 0.2 < 1 < promises[-1]


def serve_behind(controller: Controller, slots: int, periods: int = 1500) -> list[int]:
    """Sizes over a while before a server that answers so many at once, and lets the others wait for their first token.

    A request takes 0.1 s to its first token once it has a slot, and a second in all; there is always work.
    """
    sizes = []
    for _ in range(periods):
        size = controller.decide().batch_size
        sizes.append(size)
        waiting = max(0, size - slots)
        controller.observe(
            Observation(
                now_s=0.0, seconds=0.25, steps=20, step_s=0.02, tokens=50, num_running=size, num_waiting=100,
                kv_blocks_total=2**31, first_token_s=0.1 + waiting / slots,
            )
        )  # fmt: skip
    return sizes


@pytest.mark.parametrize("slots", [2, 8, 40])
def test_gradient_finds_how_many_a_server_answers_at_once_without_being_told_a_target(slots: int) -> None:
    late = serve_behind(build_sizing("gradient"), slots)[500:]
    assert max(late) <= 1.5 * slots + 2
    assert sum(late) / len(late) >= 0.75 * slots


def test_gradient_shrinks_when_requests_are_turned_away_and_says_why() -> None:
    controller = build_sizing("gradient", {"initial": 40})
    controller.observe(replace(BUSY, refusals=3))
    assert controller.decide() == (30, "the server turned requests away")
    controller.observe(replace(BUSY, refusals=3, seconds=0.25))
    assert controller.size == 30, "the same burst counts once"


def test_gradient_rests_where_nothing_waits_or_nothing_comes_back() -> None:
    controller = build_sizing("gradient")
    controller.observe(replace(BUSY, steps=0, first_token_s=None))
    assert controller.decide() == (16, "nothing was answered lately")
    controller.observe(replace(BUSY, num_waiting=0, first_token_s=0.1))
    assert controller.decide() == (16, "nothing waits for a slot")


def test_gradient_forgets_a_best_latency_that_no_load_reaches_any_more() -> None:
    controller = build_sizing("gradient", {"initial": 8, "drift": 0.01, "largest": 8})
    quick = replace(BUSY, num_running=8, first_token_s=0.1)
    controller.observe(quick)
    for _ in range(50):
        controller.observe(replace(quick, first_token_s=0.4))
    assert controller.size < 8
    for _ in range(600):
        controller.observe(replace(quick, num_running=controller.size, first_token_s=0.4))
    assert controller.size == 8
