"""What policies promise, for any requests."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.policies import (
    POLICIES,
    InvalidPolicyParameter,
    Policy,
    UnknownPolicy,
    build_policy,
)
from scheduling.core.queue import FlowQueue
from scheduling.core.request import Priority, QueueEntry
from tests.unit.policy_cases import entry_of

ENTRIES = st.lists(
    st.builds(
        entry_of,
        tenant=st.sampled_from(["ada", "bob", "cleo"]),
        priority=st.integers(0, 5),
        arrival_s=st.floats(0, 1e9),
        prompt=st.integers(1, 4000),
        output=st.integers(1, 4000),
        share=st.floats(0.0, 100.0),
    ),
    max_size=40,
)


def filled(policy: Policy, entries: list[QueueEntry]) -> FlowQueue:
    queue = FlowQueue(clock=lambda: 0.0)
    queue.init_policy(policy.name, policy.params, 1)
    for entry in entries:
        queue.enqueue(entry, policy.place(entry), revision=1, depth_limit=10**6)
    return queue


def claim_ids(queue: FlowQueue, num: int = 10**6) -> list[str]:
    claimed = queue.claim("gpu", max_requests=num, max_tokens=10**9, lease_s=5)
    return [request.id for request in claimed.requests]


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(entries=ENTRIES)
def test_every_policy_is_pure_and_serves_every_request_exactly_once(name: str, entries: list[QueueEntry]) -> None:
    policy = build_policy(name)
    numbered = [replace(e, id=f"r{i:05d}") for i, e in enumerate(entries)]
    for entry in numbered:
        assert policy.place(entry) == policy.place(entry)
        assert policy.place(entry).weight > 0
    assert sorted(claim_ids(filled(policy, numbered))) == [entry.id for entry in numbered]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_says_what_it_guarantees_and_where_it_comes_from(name: str) -> None:
    kind = POLICIES[name]
    assert kind.name == name
    assert all((kind.description, kind.guarantee, kind.source))
    assert build_policy(name, kind.params).params == build_policy(name).params


@given(arrivals=st.lists(st.floats(0, 1e9), max_size=30))
def test_fifo_serves_in_order_of_arrival_whatever_the_priority(arrivals: list[float]) -> None:
    entries = [entry_of(i, arrival_s=at, priority=i % 6) for i, at in enumerate(arrivals)]
    expected = [entry.id for entry in sorted(entries, key=lambda entry: entry.arrival_s)]
    assert claim_ids(filled(build_policy("fifo"), entries)) == expected


@given(level_s=st.floats(0, 3600), levels=st.tuples(st.integers(0, 5), st.integers(0, 5)), share=st.floats(0, 3))
def test_a_higher_priority_overtakes_only_within_the_credit_of_the_levels_between(
    level_s: float, levels: tuple[int, int], share: float
) -> None:
    gap_s = share * max(1, levels[0] - levels[1]) * level_s
    early, late = entry_of(0, priority=levels[0]), entry_of(1, priority=levels[1], arrival_s=gap_s)
    policy = build_policy("priority", {"level_s": level_s})
    overtaken = claim_ids(filled(policy, [early, late]))[0] == late.id
    credit_s = (early.priority - late.priority) * level_s
    if abs(gap_s - credit_s) > 1e-6:
        assert overtaken == (gap_s < credit_s)


def test_fair_gives_backlogged_tenants_tokens_in_proportion_to_their_weights() -> None:
    rng, weights = random.Random(7), {"ada": 1.0, "bob": 2.0, "cleo": 5.0}
    entries = [
        entry_of(i, tenant=tenant, prompt=(n := rng.randrange(10, 500)), output=n, share=weights[tenant])
        for i, tenant in enumerate(rng.choice(sorted(weights)) for _ in range(6000))
    ]
    costs = {entry.id: (entry.tenant, entry.cost_tokens) for entry in entries}
    queue, served = filled(build_policy("fair"), entries), dict.fromkeys(weights, 0.0)
    for _ in range(1500):
        tenant, cost = costs[claim_ids(queue, 1)[0]]
        served[tenant] += cost / weights[tenant]
        # Start-time fair queueing: backlogged flows are never further apart than one request each.
        assert max(served.values()) - min(served.values()) <= 2 * 1000


def test_fair_gives_a_tenant_that_was_idle_no_credit_for_it() -> None:
    policy = build_policy("fair")
    queue = filled(policy, [entry_of(i, tenant="ada") for i in range(100)])
    claim_ids(queue, 90)
    for i in range(100, 120):
        entry = entry_of(i, tenant="bob")
        queue.enqueue(entry, policy.place(entry), revision=1, depth_limit=1000)
    assert sum(id_ >= "r00100" for id_ in claim_ids(queue, 10)) in (5, 6)


def test_an_unused_output_budget_is_given_back_to_the_flow() -> None:
    policy = build_policy("fair")
    entries = [entry_of(i, tenant="ada" if i % 2 else "bob", prompt=100, output=100) for i in range(40)]
    queue = filled(policy, entries)
    for id_ in claim_ids(queue, 2):
        used = 200 if id_ == "r00000" else 20
        queue.finish("gpu", id_, 1, state="finished", used_tokens=used, finish=b"", output="")
    assert all(int(id_[1:]) % 2 for id_ in claim_ids(queue, 1)), "ada used a tenth of what was charged"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"level_s": -1}, "level_s must be a number from 0"),
        ({"level_s": float("nan")}, "level_s must be a number"),
        ({"level_s": "30"}, "level_s must be a number"),
        ({"level_s": True}, "level_s must be a number"),
        ({"speed": 1}, "no parameter 'speed'"),
    ],
)
def test_a_parameter_that_cannot_be_used_is_refused_by_name(params: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidPolicyParameter, match=message):
        build_policy("priority", params)


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(UnknownPolicy, match=r"no policy 'lifo'; there are .*fair, fifo, .*priority"):
        build_policy("lifo")


def test_priority_levels_are_ordered_as_they_are_named() -> None:
    entries = [entry_of(i, priority=priority) for i, priority in enumerate(reversed(Priority))]
    expected = [entry.id for entry in reversed(entries)]
    assert claim_ids(filled(build_policy("priority"), entries)) == expected
