"""What every policy promises, whatever it is: each registered one runs through all of this."""

import dataclasses
import math
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.policies import POLICIES, InvalidPolicyParameter, Parameter, build_policy
from scheduling.core.request import QueueEntry
from scheduling.core.rules import LATE
from tests.unit.policy_cases import ENTRIES, NO_LIMIT, Served, entry_of

EVERY_POLICY = pytest.mark.parametrize("name", sorted(POLICIES))


@EVERY_POLICY
@given(entries=ENTRIES)
def test_placement_is_pure_and_usable_by_both_queues(name: str, entries: list[QueueEntry]) -> None:
    policy = build_policy(name)
    for entry in entries:
        place = policy.place(entry)
        assert place == policy.place(entry)
        assert 0 < place.weight < math.inf
        assert abs(place.rank) < LATE
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


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(3))
def test_no_stream_of_better_requests_starves_one_that_waits(name: str, seed: int) -> None:
    params = {"promote_after_s": 60.0} if "promote_after_s" in POLICIES[name].parameters else {}
    rng, served = Random(seed), Served(build_policy(name, params))
    victim = entry_of(0, tenant="victim", priority=5, prompt=3000, output=3000, share=0.5)
    served.put(victim)
    # One request a second is served, and two of a kind that the policy prefers come.
    for second in range(1, 2000):
        served.now = float(second)
        for k in range(2):
            fields: dict[str, Any] = {"tenant": f"t{rng.randrange(4)}", "priority": rng.randrange(3), "share": 2.0}
            served.put(entry_of(2 * second + k, arrival_s=served.now, prompt=100, output=100, **fields))
        if victim in served.claim(1):
            return
    pytest.fail(f"{name} let a request wait for 2000 s")


def test_rules_say_whether_they_reorder() -> None:
    plain = build_policy("fair").rules
    assert not plain.reorders
    for change in ({"run": 2}, {"promote_after_s": 0.0}, {"late_slack_s": 0.0}):
        assert dataclasses.replace(plain, **change).reorders
