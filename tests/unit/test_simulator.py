"""The simulator: nothing lost, time in order, fast-forward changes nothing, and queueing theory is met."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.planner import Mode
from scheduling.core.policies import POLICIES, build_policy
from scheduling.core.room import URGENT_PERIOD_S
from scheduling.core.rules import MAX_EXPIRED
from scheduling.core.simulation.admission import AdmissionSettings
from scheduling.core.simulation.limits import TenantLimit
from scheduling.core.simulation.outcome import ServiceTarget, ServiceTargets, SimulationResult
from scheduling.core.simulation.replica import SwapSettings
from scheduling.core.simulation.simulator import RETRY_S, SWEEP_S, SimulationSettings, simulate
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import DEFAULT_COST, StepCost, SwapLink
from scheduling.core.sizing.strategies import SIZINGS, build_sizing
from scheduling.core.triggers import UrgentPresent, batch_triggers
from tests.simulations import TARGETS, fleet, request

SWAP = SwapSettings(link=SwapLink(bytes_per_s=50e9), kv_bytes_per_token=131_072)
RESTLESS = build_policy("adaptive", {"calm_depth": 1, "dwell_s": 1, "hold_s": 0, "imbalance": 1.1})


def account(result: SimulationResult) -> list[tuple[object, ...]]:
    """All that a simulation says of its requests."""
    return [(o.state, o.reason, o.replica, o.claimed_s, o.first_token_s, o.finished_s) for o in result.outcomes]


traces = st.lists(
    st.tuples(
        st.floats(0, 3),
        st.sampled_from("abc"),
        st.integers(1, 120),
        st.integers(1, 90),
        st.integers(0, 5),
        st.integers(0, 30),
        st.none() | st.floats(0, 0.5),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
).map(
    lambda rows: [
        TraceRequest(
            at,
            tenant,
            prompt,
            output,
            priority,
            output + spare,
            None if within is None else at + within,
            drop_expired=drop,
        )
        for at, tenant, prompt, output, priority, spare, within, drop in sorted(rows, key=lambda row: row[0])
    ]
)
sizings: st.SearchStrategy[Callable[[int], Any] | None] = st.none() | st.sampled_from(sorted(SIZINGS)).map(
    lambda name: lambda index: build_sizing(name, {"initial": 3}, random=Random(index))
)
fleets = st.builds(
    SimulationSettings,
    policy=st.sampled_from(sorted(POLICIES)).map(build_policy) | st.just(RESTLESS),
    num_replicas=st.integers(1, 3),
    mode=st.sampled_from(get_args(Mode)),
    batch_size=st.integers(1, 8),
    step_tokens=st.sampled_from([16, 64, 256]),
    num_blocks=st.sampled_from([16, 20, 40, 400]),
    targets=st.just(TARGETS),
    sizing=sizings,
    control_period_s=st.sampled_from([0.05, 0.31]),
    admission=st.none()
    | st.builds(
        AdmissionSettings,
        queue_limit=st.none() | st.integers(1, 20),
        tokens_limit=st.none() | st.integers(50, 2000),
        shed=st.booleans(),
        tenants=st.just({"a": TenantLimit(rpm=200, tpm=9000), "b": TenantLimit(concurrency=3, tpd=1500)}),
    ),
    swap=st.none() | st.just(SWAP),
    trigger=st.none() | st.sampled_from([batch_triggers(3, 0.02), batch_triggers(6, 0.1, alone=True)]),
    claim_s=st.sampled_from([0.0, 0.0, 0.004, 0.03]),
    pace=st.sampled_from([(), (), (1.5, 0.7, 3.0)]),
    long_prefill_threshold=st.sampled_from([0, 0, 8]),
    prefix_cache=st.booleans(),
)
REASONS = {
    "overloaded", "queue_full", "shed", "too long", "deadline_exceeded",
    "requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency",
}  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(trace=traces, fleet=fleets)
def test_fast_forward_gives_exactly_what_single_steps_give(
    trace: list[TraceRequest], fleet: SimulationSettings
) -> None:
    fast = simulate(trace, fleet, DEFAULT_COST)
    slow = simulate(trace, replace(fleet, fast_forward=False), DEFAULT_COST)
    assert account(fast) == account(slow)
    assert fast.batch_sizes == slow.batch_sizes
    assert fast.size_changes == slow.size_changes
    assert fast.policy_changes == slow.policy_changes
    assert (fast.end_s, fast.steps, fast.preemptions) == (slow.end_s, slow.steps, slow.preemptions)
    if fleet.num_replicas == 1:
        assert fast.busy_s == slow.busy_s


@settings(max_examples=60, deadline=None)
@given(trace=traces, fleet=fleets)
def test_every_request_ends_once_and_its_times_are_in_order(
    trace: list[TraceRequest], fleet: SimulationSettings
) -> None:
    result = simulate(trace, fleet, DEFAULT_COST)
    assert [o.request for o in result.outcomes] == trace
    for outcome in result.outcomes:
        assert outcome.state in ("finished", "refused")
        if outcome.state == "refused":
            assert outcome.reason in REASONS
            continue
        times = (outcome.request.arrival_s, outcome.claimed_s, outcome.first_token_s, outcome.finished_s)
        assert list(times) == sorted(t for t in times if t is not None)
        assert outcome.tpot_s is None or outcome.tpot_s > 0
    if fleet.admission is None:
        limit = fleet.num_blocks * fleet.block_size
        for outcome in result.outcomes:
            is_too_long = outcome.request.prompt_tokens + outcome.request.max_tokens > limit
            assert (outcome.state == "refused") == (is_too_long or outcome.reason == "deadline_exceeded")
    assert sum(result.batch_sizes.values()) == result.steps
    assert result.busy_s <= result.end_s * fleet.num_replicas + 1e-9


def test_one_request_takes_what_its_steps_cost() -> None:
    cost = StepCost(step_s=0.01, prefill_token_s=1e-4, decode_sequence_s=1e-3, context_token_s=1e-6)
    result = simulate([request(1.0, prompt=100, output=3)], fleet(), cost)
    (outcome,) = result.outcomes
    assert outcome.ttft_s is not None
    assert outcome.ttft_s == pytest.approx(2 * 0.01 + 100 * 1e-4), "two chunks of 64 and 36"
    assert outcome.e2e_s == pytest.approx(outcome.ttft_s + 2 * 0.011 + (101 + 102) * 1e-6)
    assert result.batch_sizes == {1: 4}
    assert result.busy_s == pytest.approx(outcome.e2e_s)


def test_fifo_serves_in_order_and_a_higher_priority_overtakes_under_priority() -> None:
    crowd = [request(0.001 * i, output=40) for i in range(12)]
    trace = [*crowd, request(0.05, priority=0)]
    late = {}
    for name in ("fifo", "priority"):
        outcomes = simulate(trace, fleet(policy=build_policy(name)), DEFAULT_COST).outcomes
        starts = [o.claimed_s for o in outcomes[:-1] if o.claimed_s is not None]
        assert starts == sorted(starts)
        late[name] = outcomes[-1].claimed_s
    assert late["priority"] is not None
    assert late["fifo"] is not None
    assert late["priority"] < late["fifo"]


def test_fair_keeps_a_light_tenant_out_of_a_heavy_one_s_queue() -> None:
    heavy = [request(0.0, "heavy", output=30) for _ in range(100)]
    trace = sorted([*heavy, *(request(0.2 * i, "light") for i in range(1, 6))])
    waits = {}
    for name in ("fifo", "fair"):
        outcomes = simulate(trace, fleet(policy=build_policy(name)), DEFAULT_COST).outcomes
        waits[name] = [o.wait_s or 0.0 for o in outcomes if o.request.tenant == "light"]
    assert max(waits["fair"]) * 5 < max(waits["fifo"])


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_waits_meet_queueing_theory(num_replicas: int) -> None:
    """Serial service of constant length with random arrivals: M/D/1 (Pollaczek-Khinchine); for two, M/D/2 halves it."""
    random, clock, load, service_s = Random(3), 0.0, 0.7, 0.1
    trace = []
    for _ in range(4_000):
        clock += random.expovariate(load * num_replicas / service_s)
        trace.append(request(clock, prompt=1, output=1))
    cost = StepCost(step_s=service_s, prefill_token_s=0, decode_sequence_s=0, context_token_s=0)
    result = simulate(trace, fleet(mode="serial", num_replicas=num_replicas), cost)
    waits = [o.wait_s or 0.0 for o in result.outcomes]
    single = load * service_s / (2 * (1 - load))
    # M/D/2 from Cosmetatos' approximation: (1 + (1-r)(c-1)(sqrt(4+5c)-2)/(16rc)) / 2 of M/M/2.
    expected = single if num_replicas == 1 else 0.5 * 1.029 * service_s * load**2 / (1 - load**2)
    assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.1)


def test_preempted_requests_are_computed_again_at_a_cost_and_swapping_can_be_cheaper() -> None:
    trace = [request(0.01 * i, prompt=60, output=150) for i in range(8)]
    scarce = {"num_blocks": 40, "batch_size": 8}
    roomy = simulate(trace, fleet(batch_size=8), DEFAULT_COST)
    recomputed = simulate(trace, fleet(**scarce), DEFAULT_COST)
    dear_prefill = replace(DEFAULT_COST, prefill_token_s=2e-3)
    swapped = simulate(trace, fleet(**scarce, swap=SWAP), dear_prefill)
    unswapped = simulate(trace, fleet(**scarce), dear_prefill)
    assert roomy.preemptions == 0
    assert recomputed.preemptions > 0
    assert recomputed.end_s > roomy.end_s
    assert swapped.busy_s < unswapped.busy_s


def test_a_sizing_controller_sees_the_engine_and_is_obeyed() -> None:
    trace = [request(0.01 * i, output=50) for i in range(300)]
    sized = fleet(sizing=lambda _: build_sizing("throughput_first", {"initial": 2}), num_blocks=2000)
    result = simulate(trace, sized, DEFAULT_COST)
    assert len(result.size_changes) > 3
    assert max(result.batch_sizes) > 10
    assert result.size_changes[0].batch_size == 2
    assert result.size_changes[1].reason.startswith("work waits")


def test_a_sizing_controller_heeds_a_request_s_own_deadline_as_an_engine_s_does() -> None:
    calm = [request(0.01 * i, output=50) for i in range(100)]
    pressed = [one._replace(deadline_s=one.arrival_s + 0.01) for one in calm]
    sized = fleet(
        sizing=lambda _: build_sizing("latency_first", {"initial": 8}), targets=ServiceTargets(default=ServiceTarget())
    )
    assert [change.batch_size for change in simulate(calm, sized, DEFAULT_COST).size_changes] == [8]
    changes = simulate(pressed, sized, DEFAULT_COST).size_changes
    assert [change.batch_size for change in changes[:3]] == [8, 6, 4]


def test_the_adaptive_policy_switches_when_one_tenant_floods_and_says_why() -> None:
    flood = [request(5.0, "heavy", output=60) for _ in range(600)]
    trace = sorted([*flood, *(request(0.5 * i, tenant, output=30) for i in range(80) for tenant in ("b", "c"))])
    adaptive = fleet(policy=build_policy("adaptive", {"dwell_s": 5}), targets=ServiceTargets())
    result = simulate(trace, adaptive, DEFAULT_COST)
    first = result.policy_changes[0]
    assert first.policy in ("fair", "hierarchical")
    assert first.time_s >= 15
    assert "one tenant has" in first.reason
    assert all(outcome.state == "finished" for outcome in result.outcomes)


def test_adaptive_goes_by_the_targets_it_was_given_where_a_tenant_has_none() -> None:
    trace = [request(0.05 * i, output=30) for i in range(600)]

    def switches(**targets: float) -> list[str]:
        adaptive = build_policy("adaptive", {"dwell_s": 5, **targets})
        result = simulate(trace, fleet(policy=adaptive, targets=ServiceTargets(), batch_size=1), DEFAULT_COST)
        return [change.policy for change in result.policy_changes]

    assert switches()[0] == "edf", "30 s are not met"
    assert switches(normal_s=86_400.0) == []


def test_dynamic_mode_waits_for_its_batch() -> None:
    alone = simulate([request(1.0)], fleet(mode="dynamic"), DEFAULT_COST).outcomes[0]
    assert alone.wait_s == 0.0
    assert alone.ttft_s is not None
    assert alone.ttft_s > 0.05
    together = simulate([request(1.0)] * 4, fleet(mode="dynamic"), DEFAULT_COST).outcomes[0]
    assert together.ttft_s is not None
    assert together.ttft_s < 0.05


def test_a_batch_starts_when_its_trigger_fires() -> None:
    patient = fleet(mode="dynamic", trigger=batch_triggers(4, 0.2))
    alone = simulate([request(1.0)], patient, DEFAULT_COST).outcomes[0]
    urgent = simulate([request(1.0, priority=0)], patient, DEFAULT_COST).outcomes[0]
    assert alone.ttft_s is not None
    assert urgent.ttft_s is not None
    assert alone.ttft_s - urgent.ttft_s == pytest.approx(0.2)


def test_what_no_trigger_ever_starts_waits_when_the_simulation_ends() -> None:
    result = simulate([request(1.0)], fleet(mode="static", trigger=UrgentPresent()), DEFAULT_COST)
    assert result.outcomes[0].state == "running"
    assert result.outcomes[0].first_token_s is None


def test_a_higher_request_takes_a_slot_under_priority_and_waits_for_one_under_fifo() -> None:
    trace = [*(request(0.0, output=80, priority=5) for _ in range(4)), request(0.1, output=5, priority=0)]
    first: dict[str, float] = {}
    for name in ("fifo", "priority"):
        result = simulate(trace, fleet(policy=build_policy(name)), DEFAULT_COST)
        first[name] = result.outcomes[-1].ttft_s or 0.0
        assert (result.preemptions > 0) == (name == "priority")
        assert all(outcome.state == "finished" for outcome in result.outcomes)
    assert first["priority"] < 0.03 < 0.2 < first["fifo"]


def test_a_full_engine_looks_for_an_urgent_request_at_intervals_since_its_last_claim() -> None:
    full = [request(0.01, output=80, priority=5) for _ in range(4)]
    for arrival_s, found_s in ((0.02, 0.06), (0.07, 0.11), (0.2, 0.21)):
        trace = [*full, request(arrival_s, priority=0)]
        result = simulate(trace, fleet(policy=build_policy("priority")), DEFAULT_COST)
        assert result.outcomes[-1].claimed_s == pytest.approx(found_s)
    # A claim for a slot that became free counts: the next look is later.
    brief = [*full[1:], request(0.01, output=3, priority=5), request(0.015, priority=5, output=80)]
    trace = [*brief, request(0.05, priority=0)]
    outcomes = simulate(trace, fleet(policy=build_policy("priority")), DEFAULT_COST).outcomes
    assert 0.015 < (claimed_s := outcomes[4].claimed_s or 0.0) < 0.05
    assert outcomes[5].claimed_s == pytest.approx(claimed_s + URGENT_PERIOD_S)


def test_a_preempted_request_computes_only_what_it_does_not_find_any_more() -> None:
    cost = StepCost(step_s=0.01, prefill_token_s=1e-3, decode_sequence_s=0, context_token_s=0)
    trace = [request(0.0, prompt=60, output=80, priority=5), request(0.3, prompt=10, output=5, priority=0)]
    priority = build_policy("priority")
    base = fleet(policy=priority, batch_size=1, step_tokens=256)
    found, computed = (simulate(trace, replace(base, prefix_cache=is_on), cost) for is_on in (True, False))
    assert found.preemptions == computed.preemptions == 1
    # It lost its place with some 80 tokens, of which all but those of the last block were kept.
    num_found = (computed.busy_s - found.busy_s) / cost.prefill_token_s
    assert 64 <= num_found <= 96
    assert num_found == pytest.approx(16 * round(num_found / 16), abs=0.01)


def test_fair_charges_what_was_generated_and_not_what_was_asked_for() -> None:
    bold = [request(0.0, "bold", output=20, max_tokens=400) for _ in range(60)]
    modest = [request(0.0, "modest", output=20, max_tokens=20) for _ in range(60)]
    outcomes = simulate([*bold, *modest], fleet(policy=build_policy("fair"), num_blocks=4000), DEFAULT_COST).outcomes
    half = sorted(o.finished_s or 0.0 for o in outcomes)[59]
    first = [o.request.tenant for o in outcomes if (o.finished_s or 0.0) <= half]
    assert first.count("bold") >= 25, "by what they asked for it would be 8"


def test_moving_blocks_to_host_memory_and_back_takes_its_time() -> None:
    cost = StepCost(step_s=0.01, prefill_token_s=1.0, decode_sequence_s=0, context_token_s=0)
    trace = [request(0.0, prompt=60, output=80, priority=5), request(60.4, prompt=1, output=5, priority=0)]
    base = fleet(policy=build_policy("priority"), batch_size=1, prefix_cache=False)
    busy = []
    for bytes_per_s in (1e6, 2e6):
        swap = SwapSettings(link=SwapLink(bytes_per_s=bytes_per_s, latency_s=0.0), kv_bytes_per_token=1000)
        result = simulate(trace, replace(base, swap=swap), cost)
        assert result.preemptions == 1
        busy.append(result.busy_s)
    # Of 60 tokens and some more, blocks of 16: out and in, half as fast the first time.
    moved_s = 2 * (busy[0] - busy[1])
    assert moved_s == pytest.approx(2 * 16_000 * round(moved_s / 0.032) / 1e6)
    assert 4 <= round(moved_s / 0.032) <= 9


def test_a_machine_that_was_slow_for_a_while_is_slow_then() -> None:
    trace = [request(float(i)) for i in range(4)]
    usual, slowed = (
        [o.e2e_s or 0.0 for o in simulate(trace, fleet(pace=pace), DEFAULT_COST).outcomes] for pace in ((), (1, 1, 3))
    )
    assert slowed == pytest.approx([usual[0], usual[1], 3 * usual[2], usual[3]])


def test_a_claim_takes_its_time_where_the_engine_waits_for_it() -> None:
    trace = [request(float(i)) for i in range(3)]
    at_once, later = (simulate(trace, fleet(claim_s=seconds), DEFAULT_COST).outcomes for seconds in (0.0, 0.005))
    for before, after in zip(at_once, later, strict=True):
        assert after.wait_s == pytest.approx(0.005)
        assert (after.e2e_s or 0) - (before.e2e_s or 0) == pytest.approx(0.005)


def test_a_slot_that_nobody_saw_becoming_free_stays_empty_for_a_step() -> None:
    cost = StepCost(step_s=0.01, prefill_token_s=0, decode_sequence_s=0, context_token_s=0)
    for spare, steps in ((0, 20), (50, 21)):
        trace = [request(0.0, output=10, max_tokens=10 + spare)] * 2 + [request(0.0, output=10, max_tokens=10 + spare)]
        result = simulate(trace, fleet(batch_size=2), cost)
        assert result.end_s == pytest.approx(0.01 * steps)


def test_progress_is_told_up_to_the_end() -> None:
    seen: list[int] = []
    simulate([request(0.01 * i) for i in range(600)], fleet(), DEFAULT_COST, progress=seen.append)
    assert seen == [256, 512, 600]
    with pytest.raises(ValueError, match="at least one replica"):
        fleet(num_replicas=0)


def test_the_example_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "docs/simulator.md", "exec"), {"__name__": "__main__"})
    assert "by tenant" in capsys.readouterr().out


def test_a_claim_that_only_dropped_what_was_late_is_repeated_at_once() -> None:
    late = [request(0.01, deadline_s=0.02, drop_expired=True) for _ in range(9 * MAX_EXPIRED)]
    trace = [request(0.0, output=30), *late, request(0.03)]
    first, *_, last = simulate(trace, fleet(batch_size=1), DEFAULT_COST).outcomes
    assert first.finished_s is not None
    assert last.claimed_s is not None
    assert first.finished_s < SWEEP_S, "only claims drop so soon"
    assert last.claimed_s < first.finished_s + RETRY_S / 2
