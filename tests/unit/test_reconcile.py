"""From what is wanted and what runs to what a machine starts and stops."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.plan import Plan, PlannedReplica, RunningReplica, decode_plan, encode_plan
from inference.reconcile import BACKOFF_S, Action, Forget, Start, Stop, Wanted, pause_s, reconcile, wanted_here

OWN = Wanted(name="gpu-0", device="cpu", own=True)
NOW_S = 1000.0


def planned(name: str, **fields: Any) -> PlannedReplica:
    return PlannedReplica(name=name, **({"model": "demo", "machine": "here", "device": "cpu"} | fields))


def plan_of(*replicas: PlannedReplica) -> Plan:
    return Plan(revision=1, replicas={replica.name: replica for replica in replicas})


def running(wanted: Wanted, **fields: Any) -> RunningReplica:
    usual: dict[str, Any] = {
        "name": wanted.name, "model": wanted.model, "device": wanted.device, "generation": wanted.generation,
        "own": wanted.own, "state": "running",
    }  # fmt: skip
    return RunningReplica(**(usual | fields))


def wanted_of(plan: Plan, *, orchestrated: bool = False) -> dict[str, Wanted]:
    return wanted_here(plan, machine="here", own=[OWN], orchestrated=orchestrated)


def test_a_machine_runs_what_its_settings_ask_for_and_what_the_plan_places_there() -> None:
    plan = plan_of(
        planned("gpu-1", generation=3), planned("gpu-2", machine="there"), planned("gpu-3", wanted="stopped")
    )
    wanted = wanted_of(plan)
    assert wanted["gpu-0"] == OWN
    assert wanted["gpu-1"] == Wanted(name="gpu-1", model="demo", device="cpu", generation=3)
    assert wanted.keys() == {"gpu-0", "gpu-1"}


def test_what_operators_told_a_replica_of_the_settings_does_not_place_it_elsewhere() -> None:
    plan = plan_of(planned("gpu-0", model="", machine="", generation=2, commands={"gate": ("pause", {})}))
    assert wanted_of(plan) == {"gpu-0": Wanted(name="gpu-0", device="cpu", generation=2, own=True)}
    assert wanted_of(plan_of(planned("gpu-0", model="", wanted="stopped"))) == {}


def test_an_orchestrated_machine_restarts_and_neither_adds_nor_removes() -> None:
    plan = plan_of(planned("gpu-0", wanted="stopped", generation=1), planned("gpu-1"))
    assert wanted_of(plan, orchestrated=True) == {
        "gpu-0": Wanted(name="gpu-0", device="cpu", generation=1, own=True),
    }


def test_missing_ones_start_and_surplus_ones_drain_with_the_limit_of_their_removal() -> None:
    plan = plan_of(planned("gpu-1"), planned("gpu-2", wanted="stopped", drain_s=7.0))
    wanted = wanted_of(plan)
    here = {"gpu-2": running(Wanted(name="gpu-2", model="demo", device="cpu"))}
    assert reconcile(wanted, here, plan, now_s=NOW_S) == [
        Stop("gpu-2", 7.0),
        Start(wanted["gpu-0"]),
        Start(wanted["gpu-1"]),
    ]


def test_one_that_the_plan_names_no_more_drains_as_the_machine_has_it() -> None:
    gone = Wanted(name="gpu-9", model="demo", device="cpu")
    assert reconcile({}, {"gpu-9": running(gone)}, Plan(), now_s=NOW_S) == [Stop("gpu-9", None)]


@pytest.mark.parametrize("changed", [{"generation": 1}, {"model": "other"}, {"device": "GPU-1"}])
def test_one_that_is_wanted_in_another_way_is_stopped_and_then_started(changed: dict[str, Any]) -> None:
    before = Wanted(name="gpu-1", model="demo", device="cpu")
    plan = plan_of(planned("gpu-1", **changed))
    wanted = wanted_here(plan, machine="here", own=[], orchestrated=False)
    assert reconcile(wanted, {"gpu-1": running(before)}, plan, now_s=NOW_S) == [Stop("gpu-1", None)]
    assert reconcile(wanted, {"gpu-1": running(before, state="stopping")}, plan, now_s=NOW_S) == []
    assert reconcile(wanted, {}, plan, now_s=NOW_S) == [Start(wanted["gpu-1"])]


def test_one_that_drains_is_hurried_only_by_a_limit_of_nothing() -> None:
    gone = Wanted(name="gpu-1", model="demo", device="cpu")
    draining = running(gone, state="stopping", drain_s=60.0)
    patient = plan_of(planned("gpu-1", wanted="stopped", drain_s=30.0))
    hurried = plan_of(planned("gpu-1", wanted="stopped", drain_s=0.0))
    assert reconcile({}, {"gpu-1": draining}, patient, now_s=NOW_S) == []
    assert reconcile({}, {"gpu-1": draining}, hurried, now_s=NOW_S) == [Stop("gpu-1", 0.0)]
    told = msgspec.structs.replace(draining, drain_s=0.0)
    assert reconcile({}, {"gpu-1": told}, hurried, now_s=NOW_S) == []


def test_one_that_failed_waits_for_its_next_try_unless_an_operator_asks_for_something_else() -> None:
    plan = plan_of(planned("gpu-1"))
    wanted = wanted_here(plan, machine="here", own=[], orchestrated=False)
    failed = running(wanted["gpu-1"], state="waiting", until_s=NOW_S + 5)
    assert reconcile(wanted, {"gpu-1": failed}, plan, now_s=NOW_S) == []
    assert reconcile(wanted, {"gpu-1": failed}, plan, now_s=NOW_S + 5) == [Start(wanted["gpu-1"])]
    anew = {"gpu-1": Wanted(name="gpu-1", model="demo", device="cpu", generation=1)}
    assert reconcile(anew, {"gpu-1": failed}, plan, now_s=NOW_S) == [Start(anew["gpu-1"])]
    assert reconcile({}, {"gpu-1": failed}, plan, now_s=NOW_S) == [Forget("gpu-1")]


def test_pauses_grow_and_stay_bounded() -> None:
    pauses = [pause_s(num) for num in range(1, 20)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == BACKOFF_S[-1]


@st.composite
def fleets(draw: st.DrawFn) -> tuple[dict[str, Wanted], dict[str, RunningReplica], Plan]:
    names = ["gpu-0", "gpu-1", "gpu-2"]
    plan = plan_of(
        *(
            planned(
                name,
                generation=draw(st.integers(0, 2)),
                wanted=draw(st.sampled_from(["running", "stopped"])),
                drain_s=draw(st.sampled_from([None, 0.0, 5.0])),
            )
            for name in names
            if draw(st.booleans())
        )
    )
    here = {
        name: running(
            Wanted(name=name, model="demo", device="cpu", generation=draw(st.integers(0, 2))),
            state=draw(st.sampled_from(["running", "stopping", "waiting"])),
            until_s=draw(st.sampled_from([None, NOW_S - 1, NOW_S + 9])),
            drain_s=draw(st.sampled_from([None, 0.0, 5.0])),
        )
        for name in names
        if draw(st.booleans())
    }
    return wanted_here(plan, machine="here", own=[], orchestrated=False), here, plan


def carry_out(actions: list[Action], here: dict[str, RunningReplica]) -> dict[str, RunningReplica]:
    """What runs once the actions were carried out and what was stopping has ended."""
    after = {name: replica for name, replica in here.items() if replica.state != "stopping"}
    for action in actions:
        match action:
            case Start(wish):
                after[wish.name] = running(wish)
            case Stop(name, _):
                after.pop(name, None)
            case Forget(name):
                after.pop(name)
    return after


@given(fleets())
def test_repeated_it_converges_to_what_is_wanted_and_then_does_nothing(
    fleet: tuple[dict[str, Wanted], dict[str, RunningReplica], Plan],
) -> None:
    wanted, here, plan = fleet
    for turn in range(4):
        actions = reconcile(wanted, here, plan, now_s=NOW_S + 10 * turn)
        touched = [getattr(action, "name", None) or action.wanted.name for action in actions]  # type: ignore[union-attr]
        assert len(touched) == len(set(touched))
        here = carry_out(actions, here)
    assert {name: replica.generation for name, replica in here.items()} == {n: w.generation for n, w in wanted.items()}
    assert reconcile(wanted, here, plan, now_s=NOW_S + 100) == []


def test_a_plan_survives_its_way_and_a_lost_one_is_no_empty_one() -> None:
    plan = plan_of(
        planned("gpu-1", commands={"batch size": ("sizing", {"name": "balanced", "params": {"initial": 5.0}})})
    )
    packed = {str(k).encode() if isinstance(k, str) else k: v for k, v in encode_plan(plan).items()}
    assert decode_plan(packed) == plan  # type: ignore[arg-type]
    assert decode_plan({}) is None
    assert decode_plan({b":revision": b"4"}) == Plan(revision=4)
