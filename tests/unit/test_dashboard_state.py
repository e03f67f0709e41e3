"""Merge patches, percentiles and rates: what the live page is computed from."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.latency import LatencyWindow, quantile, summarise
from dashboard.rates import RateMeter
from dashboard.state import HISTORY_ROWS, apply, diff, extend_history, merge
from inference.messages import LATENCY_BUCKETS_S, Histogram, ReplicaStatus

leaves = st.booleans() | st.integers() | st.text(max_size=5)
keys = st.sampled_from(["a", "b", "c", "d"])
documents = st.recursive(
    st.dictionaries(keys, leaves | st.lists(st.integers(), max_size=3), max_size=3),
    lambda inner: st.dictionaries(keys, inner | st.integers(), max_size=3),
    max_leaves=6,
)


@given(documents, documents)
def test_merging_the_difference_of_two_documents_into_the_first_gives_the_second(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    assert merge(old, diff(old, new)) == new


@given(documents)
def test_documents_that_are_equal_have_an_empty_difference(document: dict[str, Any]) -> None:
    assert diff(document, document) == {}


def test_merging_leaves_the_old_document_as_it_is() -> None:
    old = {"a": {"b": 1}}
    assert merge(old, {"a": {"b": 2, "c": 3}}) == {"a": {"b": 2, "c": 3}}
    assert old == {"a": {"b": 1}}


def test_an_update_after_a_gap_or_of_another_process_is_refused() -> None:
    snapshot = {"epoch": "x", "seq": 4, "state": {"models": {}}, "history": {}}
    update = {"epoch": "x", "seq": 5, "patch": {}, "rows": {}}
    assert apply(snapshot, update)["seq"] == 5
    for wrong in ({"seq": 6}, {"seq": 4}, {"epoch": "y"}):
        with pytest.raises(ValueError, match="does not follow"):
            apply(snapshot, {**update, **wrong})


def test_history_is_bounded_and_forgets_models_that_are_gone() -> None:
    history: dict[str, Any] = {"gone": [[1]], "m": [[n] for n in range(HISTORY_ROWS)]}
    extended = extend_history(history, {"m": [HISTORY_ROWS]}, {"m": {}, "new": {}})
    assert extended == {"m": [[n] for n in range(1, HISTORY_ROWS + 1)], "new": []}


def test_a_quantile_lies_within_its_bucket() -> None:
    counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
    assert quantile(counts, 0.5) is None
    counts[9] = 100  # 0.5 s to 1 s
    assert quantile(counts, 0.5) == pytest.approx(0.75)
    counts[-1] = 900
    assert quantile(counts, 0.99) == LATENCY_BUCKETS_S[-1]


def _status(time_s: float, num: int, started_s: float = 0.0) -> ReplicaStatus:
    counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
    counts[9] = num
    histogram = Histogram(counts, 0.75 * num)
    return ReplicaStatus(
        replica="r", model="m", host="h", pid=1, state="ready", time_s=time_s, started_s=started_s, queue_time=histogram
    )


def test_percentiles_forget_what_is_older_than_a_minute() -> None:
    window = LatencyWindow(window_s=60)
    for second, num in ((1000, 500), (1030, 510), (1061, 530)):
        window.observe(_status(second, num))
    found = summarise([window], "queue_time", 1061)
    assert found is not None
    assert found.num == 30  # the 500 from before the first look do not count, nor could they be dated
    window.observe(_status(1091, 530))
    found = summarise([window], "queue_time", 1091)
    assert found is not None
    assert found.num == 20
    assert summarise([window], "queue_time", 1300) is None


def test_a_replica_that_started_again_counts_from_zero() -> None:
    window = LatencyWindow()
    window.observe(_status(1000, 500))
    window.observe(_status(1001, 3, started_s=1000.5))
    found = summarise([window], "queue_time", 1001)
    assert found is not None
    assert found.num == 3


def test_a_rate_is_taken_over_its_window_and_survives_a_counter_that_fell() -> None:
    meter = RateMeter(window_s=5)
    assert meter.per_s == 0
    for second in range(20):
        meter.observe(second, 10 * second)
    assert meter.per_s == pytest.approx(10)
    meter.observe(20, 3)
    assert meter.per_s == 0
    meter.observe(21, 5)
    assert meter.per_s == pytest.approx(2)
