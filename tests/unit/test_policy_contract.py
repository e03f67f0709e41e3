"""What every policy promises, whatever it is: each registered one runs through all of this."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from scheduling.core.policies import POLICIES, InvalidPolicyParameter, Parameter, build_policy
from scheduling.core.request import QueueEntry
from tests.unit.policy_cases import ENTRIES, NO_LIMIT, TIMES, Served, entry_of

EVERY_POLICY = pytest.mark.parametrize("name", sorted(POLICIES))


@EVERY_POLICY
@given(entries=ENTRIES)
def test_placement_is_pure_and_usable_by_both_queues(name: str, entries: list[QueueEntry]) -> None:
    policy = build_policy(name)
    for entry in entries:
        place = policy.place(entry)
        assert place == policy.place(entry)
        assert 0 < place.weight < math.inf
        assert math.isfinite(place.rank)
        assert place.flow


@EVERY_POLICY
@given(entries=ENTRIES, sizes=st.lists(st.integers(1, 8), min_size=1), now=st.floats(0, 3000))
def test_every_request_is_served_exactly_once(
    name: str, entries: list[QueueEntry], sizes: list[int], now: float
) -> None:
    served = Served(build_policy(name), entries)
    served.now = now
    ids: list[str] = []
    while batch := served.ids(sizes[len(ids) % len(sizes)]):
        ids += batch
    assert sorted(ids) == [entry.id for entry in entries]


@EVERY_POLICY
@given(entries=ENTRIES, index=st.integers(0), now=st.floats(0, 3000))
def test_an_idle_engine_always_gets_a_request_that_waits(
    name: str, entries: list[QueueEntry], index: int, now: float
) -> None:
    served = Served(build_policy(name), entries)
    served.now = now
    for waiting in range(len(entries), 0, -1):
        assert len(served.claim(1)) == 1
        assert served.queue.snapshot().depth == waiting - 1


@EVERY_POLICY
@given(entries=ENTRIES, num=st.integers(1, 10), now=st.floats(0, 3000))
def test_what_is_put_back_is_served_again_in_the_same_order(
    name: str, entries: list[QueueEntry], num: int, now: float
) -> None:
    served = Served(build_policy(name), entries)
    served.now = now
    for _ in range(num):
        before = served.ids(1)
        served.queue.release("gpu")
        assert served.ids(1) == before
        served.queue.release("gpu")


@EVERY_POLICY
@given(entries=ENTRIES, other=st.sampled_from(sorted(POLICIES)), num=st.integers(0, 10))
def test_a_switch_orders_what_waits_as_if_it_had_come_under_the_new_policy(
    name: str, entries: list[QueueEntry], other: str, num: int
) -> None:
    switched = Served(build_policy(other), entries)
    gone = switched.ids(num)
    policy = build_policy(name)
    assert switched.queue.switch(policy, 2) == len(entries) - len(gone)
    stale = switched.queue.enqueue(entry_of(999), policy.place(entry_of(999)), revision=1, depth_limit=NO_LIMIT)
    assert stale.status == "stale"
    fresh = Served(policy, [entry for entry in entries if entry.id not in gone])
    assert switched.ids() == fresh.ids()


@EVERY_POLICY
def test_it_says_what_it_guarantees_where_it_comes_from_and_what_its_parameters_mean(name: str) -> None:
    kind = POLICIES[name]
    assert kind.name == name
    assert all((kind.description, kind.guarantee, kind.source))
    assert all(parameter.description for parameter in kind.parameters.values())
    assert build_policy(name, kind.params).params == build_policy(name).params
    assert build_policy(name, build_policy(name).params).params == build_policy(name).params


@EVERY_POLICY
def test_each_parameter_takes_its_whole_range_and_nothing_else(name: str) -> None:
    for key, parameter in POLICIES[name].parameters.items():
        for value in _allowed(parameter):
            policy = build_policy(name, {key: value})
            assert policy.params[key] == value
            assert Served(policy, [entry_of(i, priority=i) for i in range(6)]).ids()
        for value in _forbidden(parameter):
            with pytest.raises(InvalidPolicyParameter, match=key):
                build_policy(name, {key: value})
    with pytest.raises(InvalidPolicyParameter, match="no parameter 'speed'"):
        build_policy(name, {"speed": 1})


def _allowed(parameter: Parameter) -> tuple[Any, ...]:
    return parameter.choices or (parameter.minimum, parameter.default, parameter.maximum)


def _forbidden(parameter: Parameter) -> tuple[Any, ...]:
    if parameter.choices:
        return ("nothing", 1, None, "")
    outside = (parameter.minimum - 1, parameter.maximum + 1)
    return (*outside, math.nan, math.inf, "1", True, None)


RIVALS = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(["ada", "bob", "cleo", "victim"]),
        "priority": st.integers(0, 5),
        "prompt": st.integers(50, 100),
        "output": st.integers(50, 100),
        "deadline_s": st.none() | st.floats(0, 100),
    }
)


@EVERY_POLICY
@settings(max_examples=12, deadline=None, phases=(Phase.reuse, Phase.generate))
@given(pattern=st.lists(st.lists(RIVALS, max_size=3), min_size=1, max_size=6))
def test_no_pattern_of_arrivals_starves_one_that_waits(name: str, pattern: list[list[dict[str, Any]]]) -> None:
    # Four tenants, 25 s of credit at most: by each guarantee some hundred requests go before, however many come.
    known = POLICIES[name].parameters
    params = {key: value for key, value in {"promote_after_s": 60.0, "level_s": 5.0}.items() if key in known}
    served = Served(build_policy(name, params))
    victim = entry_of(0, tenant="victim", priority=5, prompt=100, output=100)
    served.put(victim)
    # For ever the same pattern of seconds, each with up to three rivals; one request a second is served.
    for second in range(1, 1000):
        served.now = float(second)
        for rival in pattern[second % len(pattern)]:
            deadline_s = None if rival["deadline_s"] is None else second + rival["deadline_s"]
            served.put(entry_of(len(served.entries), **{**rival, "arrival_s": served.now, "deadline_s": deadline_s}))
        if victim in served.claim(1):
            return
    pytest.fail(f"{name} let a request wait for 1000 s")


@EVERY_POLICY
@given(entries=ENTRIES, asked=st.integers(0), sizes=st.lists(st.integers(0, 3), min_size=1, max_size=8), step_s=TIMES)
def test_past_its_deadline_a_request_that_asks_for_it_is_dropped_once_and_no_other_ever(
    name: str, entries: list[QueueEntry], asked: int, sizes: list[int], step_s: float
) -> None:
    marked = [dataclasses.replace(e, drop_expired=bool(asked >> i & 1)) for i, e in enumerate(entries)]
    served, claimed, dropped = Served(build_policy(name), marked), list[str](), list[str]()
    for size in [*sizes, NO_LIMIT]:
        served.now += step_s / 10
        answer = served.queue.claim("gpu", max_requests=size, max_tokens=NO_LIMIT, lease_s=1e9)
        dropped += [shed.id for shed in answer.dropped]
        claimed += [request.id for request in answer.requests]
        overdue = {e.id for e in marked if e.drop_expired and e.deadline_s is not None and e.deadline_s < served.now}
        assert overdue <= {*dropped, *claimed}, "one that waits past its deadline"
        assert set(dropped) <= overdue
        assert not overdue & {request.id for request in answer.requests}
    assert sorted(claimed + dropped) == [entry.id for entry in marked]
    assert served.queue.snapshot().expired_total == len(dropped)


def test_rules_say_whether_they_reorder() -> None:
    plain = build_policy("fair").rules
    assert not plain.reorders
    for change in ({"run": 2}, {"promote_after_s": 0.0}, {"late_slack_s": 0.0}):
        assert dataclasses.replace(plain, **change).reorders
