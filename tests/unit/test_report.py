"""Reports: figures that can be checked by hand, fairness at its extremes, a readable table and a valid chart."""

import json
import re
from collections import Counter
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.simulation.chart import _Axis, draw_page
from scheduling.core.simulation.outcome import Outcome, ServiceTarget, ServiceTargets, SimulationResult
from scheduling.core.simulation.report import (
    Report,
    build_report,
    fair_level,
    jain,
    jain_of_service,
    light_half,
    spread_of,
)
from scheduling.core.simulation.table import compare_reports, format_seconds
from scheduling.core.simulation.trace import TraceRequest

TARGETS = ServiceTargets(default=ServiceTarget(ttft_s=1.0), by_priority={0: ServiceTarget(ttft_s=0.1, e2e_s=1.0)})


def outcome(
    tenant: str, arrival_s: float, claimed_s: float, first_s: float, end_s: float, priority: int = 3, tokens: int = 10
) -> Outcome:
    request = TraceRequest(arrival_s, tenant, tokens, tokens, priority, tokens)
    return Outcome(request, "finished", "", 0, claimed_s, first_s, end_s)


def result_of(outcomes: list[Outcome]) -> SimulationResult:
    end_s = max(o.finished_s or 0.0 for o in outcomes)
    return SimulationResult(
        outcomes=outcomes,
        end_s=end_s,
        steps=10,
        busy_s=end_s / 2,
        preemptions=3,
        batch_sizes=Counter({1: 4, 2: 6}),
        size_changes=[],
        num_replicas=1,
    )


def example() -> tuple[Report, SimulationResult]:
    refused = Outcome(TraceRequest(3.0, "b <&>", 5, 5, 3, 5), "refused", "overloaded")
    outcomes = [
        outcome("a", 0.0, 0.1, 0.5, 2.0),
        outcome("a", 1.0, 3.0, 4.0, 5.0),
        outcome("b <&>", 2.0, 2.0, 2.05, 2.5, 0),
        refused,
    ]
    result = result_of(outcomes)
    return build_report("fifo", result, TARGETS), result


def test_figures_can_be_checked_by_hand() -> None:
    report, _ = example()
    assert (report.total.requests, report.total.finished, report.total.refused) == (4, 3, 1)
    assert report.duration_s == 5.0
    assert report.requests_per_s == pytest.approx(3 / 5)
    assert report.output_tokens_per_s == pytest.approx(30 / 5)
    assert report.tokens_per_s == pytest.approx(60 / 5)
    assert report.goodput_tokens_per_s == pytest.approx(20 / 5), "the second missed its time to first token"
    assert report.total.sla_attainment == pytest.approx(2 / 4)
    assert report.total.ttft_s.mean == pytest.approx((0.5 + 3.0 + 0.05) / 3)
    assert report.total.ttft_s.p50 == 0.5
    assert report.total.wait_s.maximum == 2.0
    assert report.tenants["a"].sla_attainment == 0.5
    assert set(report.priorities) == {"normal", "critical"}
    assert report.mean_batch_size == pytest.approx(1.6)
    assert report.utilization == pytest.approx(0.5)


def test_a_request_meets_its_sla_only_with_every_target() -> None:
    both = ServiceTarget(ttft_s=1.0, e2e_s=2.0, tpot_s=0.1)
    assert outcome("a", 0, 0, 1.0, 1.9).meets(both)
    assert not outcome("a", 0, 0, 1.1, 1.9).meets(both)
    assert not outcome("a", 0, 0, 0.5, 2.1).meets(both)
    assert not outcome("a", 0, 0, 0.5, 1.5).meets(both), "0.11 s a token"


@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentiles_are_values_that_occurred_in_order(values: list[float]) -> None:
    spread = spread_of(values)
    assert spread.p50 in values
    assert spread.p99 in values
    assert spread.p50 is not None
    assert spread.p90 is not None
    assert spread.p99 is not None
    assert spread.maximum is not None
    assert spread.p50 <= spread.p90 <= spread.p99 <= spread.maximum == max(values)
    assert sum(value <= spread.p90 for value in values) >= 0.9 * len(values)


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    spread = spread_of(float(value) for value in range(1, 201))
    assert (spread.mean, spread.p50, spread.p90, spread.p99, spread.maximum) == (100.5, 100, 180, 198, 200)


def test_nothing_measured_is_none_and_not_zero() -> None:
    assert spread_of([None]).mean is None
    assert format_seconds(None) == "-"


@given(values=st.lists(st.floats(0.001, 1e6), min_size=1, max_size=20))
def test_jains_index_lies_between_one_nth_and_one(values: list[float]) -> None:
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9


@given(wanted=st.lists(st.floats(0.1, 1000), min_size=1, max_size=20), share=st.floats(0.01, 1))
def test_a_fair_division_gives_all_away_and_nobody_too_much(wanted: list[float], share: float) -> None:
    available = share * sum(wanted)
    level = fair_level(wanted, available)
    assert sum(min(want, level) for want in wanted) == pytest.approx(available)


def test_service_is_fair_when_backlogged_tenants_get_the_same_and_unfair_when_one_waits() -> None:
    even = [outcome(t, 0.0, 10.0 * i, 10.0 * i + 1, 10.0 * i + 9) for i in range(9) for t in ("a", "b")]
    assert jain_of_service(even) == pytest.approx(1.0)
    first, second = (
        [outcome(t, 0.0, 10.0 * i + at, 10.0 * i + at + 1, 10.0 * i + at + 9) for i in range(9)]
        for t, at in (("a", 0.0), ("b", 90.0))
    )
    uneven = jain_of_service(first + second)
    assert uneven is not None
    assert uneven < 0.6
    assert jain_of_service([outcome("a", 0.0, 0.0, 1.0, 2.0)]) is None, "one tenant shares with nobody"


def test_who_wants_little_and_gets_it_is_treated_fairly_beside_one_who_wants_much() -> None:
    light = [outcome("light", 10.0 * i, 10.0 * i + 1, 10.0 * i + 2, 10.0 * i + 3) for i in range(9)]
    heavy = [outcome("heavy", 0.0, 10.0 * i, 10.0 * i + 1, 10.0 * i + 9, tokens=500) for i in range(9)]
    assert jain_of_service(light + heavy) == pytest.approx(1.0)


def test_the_table_s_rows_are_the_report_s_figures() -> None:
    report, _ = example()
    rows = [re.split(" {2,}", line) for line in compare_reports([report]).split("\n\n")[0].splitlines()[2:]]
    assert {row[0]: row[1] for row in rows} == {
        "requests finished": "3 of 4", "refused": "1", "duration": "5 s", "requests/s": "0.60", "output tokens/s": "6",
        "all tokens/s": "12", "goodput, output tokens/s": "4", "SLA attainment": "50.0%",
        "TTFT mean": "1.18 s", "TTFT p50": "500 ms", "TTFT p90": "3 s", "TTFT p99": "3 s",
        "end to end mean": "2.17 s", "end to end p50": "2 s", "end to end p90": "4 s", "end to end p99": "4 s",
        "largest wait": "2 s", "Jain's index of service": "-", "preemptions": "3",
        "batch size mean, largest": "1.6, 2", "policy switches": "0", "busy": "50.0%",
    }  # fmt: skip


def test_tables_and_json_show_every_policy_side_by_side() -> None:
    report, _ = example()
    table = compare_reports([report, report])
    assert table.splitlines()[0].split() == ["fifo", "fifo"]
    assert "SLA attainment" in table
    for group, attainment in (("a (2)", "50.0%"), ("normal (3)", "33.3%")):
        figures = ["fifo", attainment, "1.75 s", "500 ms", "3 s", "3 s", "3 s", "2 s", "4 s", "4 s"]
        first = table.splitlines().index(next(line for line in table.splitlines() if line.startswith(group)))
        named, unnamed = (re.split(" {2,}", line.strip()) for line in table.splitlines()[first : first + 2])
        assert (named, unnamed) == ([group, *figures], figures)
    assert max(len(line) for line in table.splitlines()) < 120
    assert json.loads(json.dumps(report.to_dict()))["total"]["ttft_s"]["p50"] == 0.5
    assert light_half(report) == ["b <&>"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 s"), (0.0123, "12.3 ms"), (0.9999, "1 s"), (12.34, "12.3 s"), (4321.0, "4,321 s")]
)
def test_seconds_are_shown_with_three_digits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_chart_is_one_valid_page_that_fetches_nothing() -> None:
    run = example()
    page = draw_page("Replay <1>", "three & a half", [run, run])
    tree = ElementTree.fromstring(page.removeprefix("<!doctype html>"))
    assert len(tree.findall(".//figure/svg")) == 4
    assert "b <&>" in "".join(tree.itertext())
    assert "http" not in page
    assert "<script" not in page
    assert not re.search(r'[",: ](nan|inf)\b', page)


@given(low=st.floats(1e-3, 1e4), factor=st.floats(1, 1e6), is_log=st.booleans())
def test_an_axis_has_some_numbers_and_all_of_them_on_it(low: float, factor: float, is_log: bool) -> None:
    high = low * factor
    axis = _Axis(low, high, 0.0, 100.0, is_log=is_log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    if factor > 1.1:
        assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)


def test_a_chart_can_be_drawn_where_nothing_finished() -> None:
    refused = result_of([Outcome(TraceRequest(3.0, "a", 5, 5, 3, 5), "refused", "too long")])
    page = draw_page("Replay", "", [(build_report("fifo", refused, TARGETS), refused)])
    assert page.count("<figure") == 4
