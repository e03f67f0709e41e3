"""Backpressure: levels, who is refused, drain rate, Retry-After."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.backpressure import (
    CALM,
    BackpressureLimits,
    DrainRate,
    Level,
    Standing,
    admitted_priorities,
    assess,
    depth_limit,
    excess_wait_s,
    release_depth,
    settle,
)
from scheduling.core.request import Priority

LIMITS = BackpressureLimits()


@pytest.mark.parametrize(
    ("depth", "wait_s", "kv_usage", "level", "reason"),
    [
        (0, None, 0.0, Level.NONE, ""),
        (0, 0.0, 1.0, Level.NONE, ""),
        (1, 0.0, 1.0, Level.CRITICAL, "KV memory 100.0% used with 1 waiting"),
        (50, 0.0, 0.0, Level.LOW, "queue 50% full (50 of 100)"),
        (70, 0.0, 0.0, Level.MEDIUM, "queue 70% full (70 of 100)"),
        (10, 120.0, 0.0, Level.HIGH, "estimated wait 120 s"),
        (95, 30.0, 0.9, Level.CRITICAL, "queue 95% full (95 of 100)"),
    ],
)
def test_the_level_is_the_worst_of_depth_wait_and_memory_and_says_which(
    depth: int, wait_s: float | None, kv_usage: float, level: Level, reason: str
) -> None:
    assessment = assess(LIMITS, depth=depth, queue_limit=100, wait_s=wait_s, kv_usage=kv_usage)
    assert (assessment.level, assessment.reason) == (level, reason)


@given(depths=st.tuples(st.integers(0, 100), st.integers(0, 100)), wait_s=st.floats(0, 1e4), kv_usage=st.floats(0, 1))
def test_the_level_never_falls_as_the_queue_grows(depths: tuple[int, int], wait_s: float, kv_usage: float) -> None:
    low, high = (
        assess(LIMITS, depth=depth, queue_limit=100, wait_s=wait_s, kv_usage=kv_usage).level for depth in sorted(depths)
    )
    assert low <= high


def test_each_level_refuses_one_more_of_the_lower_priorities() -> None:
    assert [admitted_priorities(level) for level in Level] == [
        Priority.BULK, Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.REALTIME,
    ]  # fmt: skip


def test_every_priority_has_its_own_bound_between_two_assessments() -> None:
    limits = [depth_limit(priority, 100, Level.NONE, LIMITS) for priority in Priority]
    assert limits == [100, 100, 95, 85, 70, 50]


@given(priority=st.sampled_from(Priority), level=st.sampled_from(Level), queue_limit=st.integers(1, 100_000))
def test_a_refused_priority_has_no_room_and_an_admitted_one_has_some(
    priority: Priority, level: Level, queue_limit: int
) -> None:
    limit = depth_limit(priority, queue_limit, level, LIMITS)
    assert (limit == 0) == (priority > admitted_priorities(level))
    assert limit <= queue_limit


def test_a_steady_drain_is_measured_from_the_first_two_readings() -> None:
    rate = DrainRate()
    for second in range(4):
        rate.update(100.0 + second, 20 * second, 3000 * second)
    assert rate.requests_per_s == pytest.approx(20)
    assert rate.tokens_per_s == pytest.approx(3000)
    assert rate.wait_s(6000) == pytest.approx(2)
    assert rate.retry_after_s(depth=119, target_depth=100) == 1
    assert rate.retry_after_s(depth=199, target_depth=100) == 5


def test_the_rate_follows_a_change_within_a_few_time_constants() -> None:
    rate = DrainRate(time_constant_s=10)
    total = 0
    for second in range(100):
        total += 10 if second < 50 else 2
        rate.update(float(second), total, total)
    assert rate.requests_per_s == pytest.approx(2, rel=0.05)


def test_without_a_measured_drain_the_wait_is_unknown_and_retry_after_a_fixed_guess() -> None:
    rate = DrainRate()
    rate.update(1.0, 5, 50)
    assert rate.wait_s(100) is None
    assert rate.wait_s(0) == 0
    assert rate.retry_after_s(10, 5, unknown_s=17) == 17


def test_counters_that_start_again_do_not_give_a_negative_rate() -> None:
    rate = DrainRate()
    for second, total in enumerate([0, 100, 200, 5, 105]):
        rate.update(float(second), total, total)
    assert rate.requests_per_s == pytest.approx(100)


@given(
    readings=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 10**9)), max_size=20),
    depth=st.integers(0, 10**6),
)
def test_retry_after_is_always_whole_seconds_within_its_bounds(readings: list[tuple[float, int]], depth: int) -> None:
    rate = DrainRate()
    for now_s, total in readings:
        rate.update(now_s, total, total)
    assert 1 <= rate.retry_after_s(depth, 100) <= 600


@given(priority=st.sampled_from(Priority), wait_s=st.floats(0, 1e4))
def test_after_the_excess_of_its_wait_a_refused_priority_is_let_in_again_and_not_long_before(
    priority: Priority, wait_s: float
) -> None:
    excess_s = excess_wait_s(priority, wait_s, LIMITS)

    def lowest_admitted(later_s: float) -> Priority:
        wait_then_s = max(0.0, wait_s - later_s)
        level = assess(LIMITS.lowered(), depth=0, queue_limit=100, wait_s=wait_then_s, kv_usage=0.0).level
        return admitted_priorities(level)

    assert priority <= lowest_admitted(excess_s + 0.01)
    if excess_s > 1:
        assert priority > lowest_admitted(excess_s - 0.01)


def test_nothing_is_known_of_an_unknown_wait() -> None:
    assert excess_wait_s(Priority.BULK, None, LIMITS) == 0


def follow(readings: list[tuple[float, int, float]]) -> list[Standing]:
    """The level in force after each reading: time, depth of a queue of 1,000, KV use."""
    standing, history = CALM, []
    for now_s, depth, kv_usage in readings:
        rises, stays = (
            assess(limits, depth=depth, queue_limit=1000, wait_s=None, kv_usage=kv_usage)
            for limits in (LIMITS, LIMITS.lowered())
        )
        standing = settle(standing, rises=rises, stays=stays, hold_s=LIMITS.hold_s, now_s=now_s)
        history.append(standing)
    return history


READINGS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 1000), st.floats(0, 1)), min_size=1, max_size=40)


def at_times(steps: list[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    now_s, readings = 100.0, []
    for gap_s, depth, kv_usage in steps:
        now_s += gap_s
        readings.append((now_s, depth, kv_usage))
    return readings


@given(
    level=st.sampled_from([Level.LOW, Level.MEDIUM, Level.HIGH, Level.CRITICAL]),
    steps=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=40),
)
def test_a_depth_that_swings_around_a_threshold_within_the_band_changes_the_level_once(
    level: Level, steps: list[tuple[float, float]]
) -> None:
    top = round(LIMITS.depth[level - 1] * 1000)
    bottom = round(LIMITS.lowered().depth[level - 1] * 1000) + 1
    above = round(LIMITS.depth[level] * 1000) - 1 if level < Level.CRITICAL else 1000
    depths = [(gap_s, round(bottom + part * (above - bottom)), 0.0) for gap_s, part in steps]
    levels = [standing.assessment.level for standing in follow(at_times([(0.0, top, 0.0), *depths]))]
    assert set(levels) == {level}


@given(steps=READINGS)
def test_a_level_rises_at_once_and_falls_only_after_it_was_not_called_for_a_while(
    steps: list[tuple[float, int, float]],
) -> None:
    readings = at_times(steps)
    history = follow(readings)
    called_s = dict.fromkeys(Level, -1e9)
    before = Level.NONE
    for (now_s, depth, kv_usage), standing in zip(readings, history, strict=True):
        level = standing.assessment.level
        rises, stays = (
            assess(limits, depth=depth, queue_limit=1000, wait_s=None, kv_usage=kv_usage).level
            for limits in (LIMITS, LIMITS.lowered())
        )
        assert level >= rises
        assert level == max(before, rises) or stays < before
        if level < before:
            assert now_s - called_s[before] >= LIMITS.hold_s
            assert level == stays
        assert (standing.assessment.reason != "") == (level > Level.NONE)
        before = level
        called_s |= {called: now_s for called in Level if called <= max(rises, min(stays, level))}


def test_a_reading_within_the_band_holds_the_level_for_as_long_again() -> None:
    history = follow([(0.0, 1000, 0.0), (0.6, 900, 0.0), (1.2, 0, 0.0), (1.7, 0, 0.0)])
    assert [standing.assessment.level for standing in history] == [4, 4, 4, 0]


def test_without_load_every_level_ends() -> None:
    history = follow([(0.0, 1000, 1.0), (0.5, 0, 0.0), (0.9, 0, 0.0), (1.1, 0, 0.0)])
    assert [standing.assessment.level for standing in history] == [4, 4, 4, 0]


@given(priority=st.sampled_from(Priority), queue_limit=st.integers(20, 100_000))
def test_a_refused_priority_is_let_in_again_below_the_depth_that_refused_it(
    priority: Priority, queue_limit: int
) -> None:
    assert 1 <= release_depth(priority, queue_limit, LIMITS) <= depth_limit(priority, queue_limit, Level.NONE, LIMITS)


def test_a_tenant_waits_for_a_slot_as_long_as_its_share_of_what_is_here_takes_to_end() -> None:
    rate = DrainRate()
    assert rate.slot_s(40, 4) is None
    rate.update(0.0, 0, 0)
    rate.update(10.0, 50, 500)
    assert rate.slot_s(40, 4) == pytest.approx(40 / 5 / 4)
    assert rate.slot_s(0, 4) == 0
