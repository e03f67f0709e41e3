"""What differs between the fleet that is wanted and the one that runs, in sentences."""

from typing import Any

import pytest

from inference.fleet_view import ReplicaView, view_fleet
from inference.messages import DeploymentSpec, ReplicaStatus
from inference.plan import Machine, Plan, PlannedReplica, RunningReplica, settings_digest

NOW_S = 1000.0
SPEC = DeploymentSpec(name="demo", path="/m", created_s=1)


def machine(*replicas: RunningReplica, **fields: Any) -> Machine:
    usual: dict[str, Any] = {"name": "here", "host": "h", "pid": 1, "time_s": NOW_S, "started_s": 1.0, "revision": 5}
    return Machine(**(usual | {"replicas": list(replicas)} | fields))


def process(name: str = "gpu-1", **fields: Any) -> RunningReplica:
    usual: dict[str, Any] = {"name": name, "model": "demo", "device": "cpu", "state": "running", "since_s": 990.0}
    return RunningReplica(**(usual | fields))


def planned(name: str = "gpu-1", **fields: Any) -> PlannedReplica:
    usual: dict[str, Any] = {"name": name, "model": "demo", "machine": "here", "since_s": 980.0}
    return PlannedReplica(**(usual | fields))


def status(name: str = "gpu-1", **fields: Any) -> ReplicaStatus:
    usual: dict[str, Any] = {
        "replica": name, "model": "demo", "host": "h", "pid": 2, "state": "ready", "time_s": NOW_S, "started_s": 991.0,
        "settings": settings_digest(SPEC),
    }  # fmt: skip
    return ReplicaStatus(**(usual | fields))


def look(
    plans: list[PlannedReplica], machines: list[Machine], statuses: list[ReplicaStatus]
) -> tuple[str, list[ReplicaView]]:
    plan = Plan(revision=5, replicas={p.name: p for p in plans})
    view = view_fleet(plan, {m.name: m for m in machines}, statuses, {"demo": SPEC}, now_s=NOW_S)
    return view.deployments[0].differs, view.replicas


def test_nothing_differs_where_all_is_as_wanted() -> None:
    differs, (replica,) = look([planned()], [machine(process())], [status()])
    assert differs == replica.differs == ""
    assert (replica.state, replica.running, replica.settings, replica.can_stop) == ("ready", True, "taken up", True)


CASES: dict[str, tuple[Any, Any, Any, str, str]] = {
    "asked for": ({}, None, None, "missing", "gpu-1 is about to be started on here."),
    "starting": ({}, {}, None, "starting", "starting gpu-1 on here."),
    "loading": ({}, {}, {"state": "starting"}, "starting", "starting gpu-1 on here."),
    "broken": ({}, {}, {"state": "failed", "detail": "No weights."}, "failed", "gpu-1 cannot serve: No weights."),
    "crashing": (
        {}, {"state": "waiting", "detail": "It ended."}, None, "waiting", "gpu-1 does not stay up on here: It ended.",
    ),
    "restarted": ({"generation": 1}, {}, {}, "ready", "gpu-1 is about to be restarted on here."),
    "restarting": ({"generation": 1}, {"state": "stopping"}, {}, "ready", "gpu-1 drains to be restarted on here."),
    "removed": ({"wanted": "stopped"}, {}, {}, "ready", "gpu-1 is about to be removed on here."),
    "draining": (
        {"wanted": "stopped"}, {"state": "stopping"}, {"state": "draining"}, "draining",
        "gpu-1 drains before it is removed on here.",
    ),
    "not paused": ({"commands": {"gate": ("pause", {})}}, {}, {}, "ready", "gpu-1 should be paused, and is ready."),
    "other settings": ({}, {}, {"settings": "other"}, "ready", "gpu-1 has not taken up its deployment's settings yet."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_differs_is_said(case: tuple[Any, Any, Any, str, str]) -> None:
    plan, runs, says, state, sentence = case
    here = machine(*([] if runs is None else [process(**runs)]))
    differs, (replica,) = look([planned(**plan)], [here], [] if says is None else [status(**says)])
    assert (replica.state, replica.differs) == (state, sentence)
    assert sentence.rstrip(".") in differs


def test_the_difference_of_a_model_counts_first() -> None:
    differs, _ = look([planned(), planned("gpu-2")], [machine(process())], [status()])
    assert differs == "wanted: 2 replicas, running: 1; gpu-2 is about to be started on here."


def test_a_silent_machine_and_one_that_was_never_heard_of_are_told_apart() -> None:
    _, (replica,) = look([planned()], [machine(time_s=NOW_S - 60)], [])
    assert (replica.differs, replica.since_s) == ("gpu-1 should run on here, which is silent.", NOW_S - 60)
    _, (replica,) = look([planned(machine="attic")], [], [])
    assert replica.differs == "gpu-1 should run on attic, which has not been heard of."


def test_what_an_orchestrator_owns_is_shown_and_not_fought() -> None:
    here = machine(process(own=True), orchestrated=True)
    differs, (replica,) = look([planned(wanted="stopped", model="")], [here], [status()])
    assert replica.differs == "gpu-1 was removed, and runs until the orchestrator of here scales down."
    assert differs.startswith("wanted: 0 replicas, running: 1")
    pod = machine(process("pod-0", own=True), name="pod-0", orchestrated=True)
    _, (_, replica) = look([planned("pod-1", machine="pod-1")], [pod], [status("pod-0")])
    assert replica.differs == "pod-1 is wanted, and its orchestrator has to start it: scale up."


def test_one_that_was_started_by_hand_is_neither_removed_nor_restarted_here() -> None:
    differs, (replica,) = look([], [], [status()])
    assert (differs, replica.machine, replica.can_stop, replica.can_restart) == ("", "", False, False)


def test_a_replica_of_the_settings_that_an_operator_stopped_can_be_started_again() -> None:
    here = machine(process("gpu-0", own=True, state="stopped", model=""))
    differs, (replica,) = look([planned("gpu-0", model="", wanted="stopped")], [here], [])
    assert (differs, replica.state, replica.wanted, replica.model) == ("", "stopped", False, "demo")
    assert replica.can_restart


def test_what_operators_told_a_replica_stands_beside_it() -> None:
    told = {
        "mode": ("set_mode", {"mode": "static"}),
        "batch size": ("sizing", {"name": "balanced", "params": {"a": 2.0}}),
    }
    _, (replica,) = look([planned(commands=told)], [machine(process())], [status()])
    assert replica.notes == "batch size balanced (a 2), mode static"
