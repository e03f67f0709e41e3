"""Token buckets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.admission import Bucket


@given(
    per_minute=st.integers(1, 10_000),
    takes=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500)), max_size=50),
)
def test_no_window_admits_more_than_one_full_bucket_and_what_flows_in_meanwhile(
    per_minute: int, takes: list[tuple[float, int]]
) -> None:
    bucket, now_s, taken = Bucket.full(per_minute, 0.0), 0.0, 0
    for gap_s, amount in takes:
        now_s += gap_s
        bucket = bucket.at(now_s)
        if bucket.level >= amount:
            bucket, taken = bucket.take(amount), taken + amount
        assert taken <= per_minute + now_s * per_minute / 60 + 1e-6
        assert 0 <= bucket.level <= per_minute


@given(per_minute=st.integers(1, 10_000), amount=st.integers(1, 20_000))
def test_after_the_wait_that_was_named_the_amount_can_be_taken_or_never_can(per_minute: int, amount: int) -> None:
    empty = Bucket(per_minute, 0.0, 0.0)
    later = empty.at(empty.wait_s(amount))
    assert later.level == pytest.approx(min(amount, per_minute))


def test_what_is_given_back_never_overfills_the_bucket() -> None:
    assert Bucket.full(60, 0.0).take(10).give(100).level == 60


def test_a_lowered_limit_holds_at_once() -> None:
    assert Bucket.full(1000, 0.0).at(1.0, per_minute=30).level == 30


def test_a_clock_that_goes_back_fills_nothing() -> None:
    assert Bucket(60, 5.0, 100.0).at(50.0).level == 5.0
