"""The adaptive policy's judgement: it chooses what fits, says why, and never flaps."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.adaptive import CHOICES, RELEASE, AdaptiveState, Choice, Conditions, choose, observe
from scheduling.core.policies import POLICIES, build_policy, deadline_of
from tests.unit.policy_cases import FIELDS, entry_of

PARAMS = build_policy("adaptive").params
CONDITIONS = st.builds(
    Conditions,
    depth=st.integers(0, 100),
    imbalance=st.none() | st.floats(1, 10),
    misses=st.floats(0, 1),
    mixture=st.floats(0, 1),
    spread=st.floats(1, 20),
)


class Chooser:
    """Looks at conditions and follows its own choices."""

    def __init__(self, current: str = "fifo") -> None:
        self.current = current
        self.state = AdaptiveState(switched_s=0.0)
        self.switches: list[tuple[float, Choice]] = []

    def look(self, conditions: Conditions, now: float) -> None:
        self.state, choice = choose(self.state, conditions, current=self.current, params=PARAMS, now=now)
        if choice is not None:
            assert choice.policy != self.current
            assert choice.reason
            self.current = choice.policy
            self.switches.append((now, choice))


@given(looks=st.lists(st.tuples(st.floats(0, 30), CONDITIONS), max_size=60), first=st.sampled_from(CHOICES))
def test_whatever_it_sees_two_switches_are_never_closer_than_the_dwell(
    looks: list[tuple[float, Conditions]], first: str
) -> None:
    chooser, now = Chooser(first), 0.0
    for elapsed_s, conditions in looks:
        now += elapsed_s
        chooser.look(conditions, now)
    for (one, _), (other, _) in pairwise([(0.0, None), *chooser.switches]):
        assert other - one >= PARAMS["dwell_s"]


@given(before=st.lists(CONDITIONS, max_size=20), after=CONDITIONS)
def test_conditions_that_stay_as_they_are_cause_one_switch_at_most(before: list[Conditions], after: Conditions) -> None:
    chooser = Chooser()
    for second, conditions in enumerate(before):
        chooser.look(conditions, 10.0 * second)
    num = len(chooser.switches)
    for second in range(200):
        chooser.look(after, 10.0 * len(before) + second)
    assert len(chooser.switches) <= num + 1


@given(
    sign=st.sampled_from(["imbalance", "misses", "mixture", "spread"]),
    wobble=st.lists(st.floats(RELEASE + 0.01, 1.2), min_size=50, max_size=200),
)
def test_a_sign_that_wobbles_about_its_threshold_causes_one_switch_at_most(sign: str, wobble: list[float]) -> None:
    chooser = Chooser()
    for i, factor in enumerate(wobble):
        chooser.look(Conditions(depth=50, **{sign: factor * PARAMS[sign]}), 20.0 * i)
    assert len(chooser.switches) <= 1


@given(flips=st.lists(st.booleans(), min_size=30, max_size=100))
def test_signs_that_come_and_go_within_the_holding_time_cause_none(flips: list[bool]) -> None:
    chooser, now = Chooser(), 1000.0
    for flip in flips:
        now += PARAMS["hold_s"] / 2
        chooser.look(Conditions(depth=50, imbalance=9.0 if flip else 1.0), now)
        now += PARAMS["hold_s"] / 4
        chooser.look(Conditions(depth=50), now)
    assert chooser.switches == []


@pytest.mark.parametrize(
    ("signs", "policy", "why"),
    [
        ({"imbalance": 4.0}, "fair", "one tenant has 4.0 times"),
        ({"misses": 0.5}, "edf", "50% of what waits is past its deadline"),
        ({"imbalance": 4.0, "misses": 0.5}, "hierarchical", "past its deadline"),
        ({"mixture": 0.5}, "priority", "other priorities"),
        ({"spread": 9.0}, "size", "9.0 times the median"),
    ],
)
def test_it_chooses_what_fits_says_why_and_goes_back_when_it_is_over(
    signs: dict[str, float], policy: str, why: str
) -> None:
    chooser = Chooser()
    for second in range(80):
        chooser.look(Conditions(depth=50, **signs), float(second))
    ((when, choice),) = chooser.switches
    assert (when, choice.policy) == (60.0, policy)
    assert why in choice.reason
    for second in range(80, 160):
        chooser.look(Conditions(depth=50), float(second))
    assert [choice.policy for _, choice in chooser.switches] == [policy, "fifo"]


def test_a_tenant_that_waits_alone_since_others_are_served_fairly_does_not_end_that() -> None:
    chooser = Chooser()
    lone = Conditions(depth=50, imbalance=None)
    for second in range(100):
        chooser.look(lone, float(second))
    assert chooser.current == "fifo"
    for second in range(100, 120):
        chooser.look(Conditions(depth=50, imbalance=9.0), float(second))
    for second in range(120, 400):
        chooser.look(lone, float(second))
    assert chooser.current == "fair"
    for second in range(400, 420):
        chooser.look(Conditions(depth=50, imbalance=None, misses=0.5), float(second))
    assert [choice.policy for _, choice in chooser.switches] == ["fair", "hierarchical"]
    assert "one tenant alone waits" in chooser.switches[-1][1].reason
    for second in range(480, 500):
        chooser.look(Conditions(depth=50, imbalance=1.0), float(second))
    assert chooser.current == "fifo"


def test_while_few_wait_nothing_is_judged() -> None:
    chooser = Chooser()
    for second in range(200):
        chooser.look(Conditions(depth=3, imbalance=9.0, misses=1.0), float(second))
    assert chooser.switches == []


def test_conditions_are_read_from_what_waits() -> None:
    sample = [
        *(entry_of(i, tenant="ada", prompt=100, output=100, arrival_s=90.0) for i in range(9)),
        entry_of(9, tenant="bob", prompt=1000, output=800, arrival_s=0.0, priority=0, share=9.0),
    ]
    seen = observe(sample, 40, 100.0, deadline_of)
    assert (seen.depth, seen.imbalance, seen.misses, seen.spread) == (40, 9.0, 0.1, 9.0)
    assert seen.mixture == pytest.approx(0.1)
    assert observe(sample[:9], 9, 100.0, deadline_of).imbalance is None
    assert observe([], 0, 100.0, deadline_of) == Conditions(depth=0)


@given(fields=FIELDS, current=st.sampled_from(CHOICES), data=st.data())
def test_the_policy_chosen_goes_by_the_parameters_that_adaptive_was_given(
    fields: dict[str, Any], current: str, data: st.DataObject
) -> None:
    given = {
        name: data.draw(
            st.sampled_from(spec.choices) if spec.choices else st.integers(math.ceil(spec.minimum), int(spec.maximum)),
            label=name,
        )
        for name, spec in POLICIES[current].parameters.items()
    }
    adaptive, chosen = build_policy("adaptive", {**given, "current": current}), build_policy(current, given)
    entry = entry_of(**fields)
    assert adaptive.place(entry) == chosen.place(entry)
    assert adaptive.rules == chosen.rules
