"""A changed deployment: taken up between two steps where that can be, else by a drained engine and a new one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import redis

from inference.messages import DeploymentSpec, ReplicaStatus
from inference.plan import PlannedReplica
from inference.worker.rollout import judge_change, overridden
from inference.worker.supervisor import EngineSupervisor, SupervisorOptions
from scheduling.keys import Keys
from tests.integration.engines import COMMAND, Engines
from tests.integration.fleet import FleetClient
from tests.patience import PATIENCE_S

SPEC = DeploymentSpec(name=Engines.model, path="/m", max_batch_size=8, kv_memory_bytes=4 * 2**20, created_s=1)


@pytest.fixture
def supervisor(redis_url: str, keys: Keys) -> Iterator[EngineSupervisor]:
    options = SupervisorOptions(
        command=COMMAND, replica="gpu-0", redis_url=redis_url, key_prefix=keys.prefix, device="cpu", lease_s=60.0
    )
    supervisor = EngineSupervisor(options)
    yield supervisor
    supervisor.close(0)
    if supervisor.is_alive():
        supervisor.join(PATIENCE_S)


def deploy(store: redis.Redis, keys: Keys, path: Path, **fields: Any) -> None:
    spec = msgspec.structs.replace(SPEC, path=str(path), **fields)
    store.hset(keys.deployments, spec.name, msgspec.json.encode(spec))


def read_status(fleet: FleetClient) -> ReplicaStatus:
    status = fleet.status("gpu-0")
    assert status is not None
    return status


def engine_pids() -> list[int]:
    return [child.pid for child in psutil.Process().children() if "inference.worker" in child.cmdline()]


@pytest.mark.parametrize(
    ("fields", "verdict", "taken_back"),
    [
        ({}, "none", []),
        ({"created_s": 9}, "none", []),
        ({"mode": "static"}, "live", ["mode"]),
        ({"max_batch_size": 4, "triggers": {"size": 2}}, "live", ["batch size"]),
        ({"sizing": "balanced"}, "live", ["batch size"]),
        ({"long_prefill_threshold": 0}, "live", []),
        ({"path": "/other"}, "restart", []),
        ({"mode": "serial", "prefix_cache": "off"}, "restart", ["mode"]),
    ],
)
def test_a_change_is_judged_by_its_fields(fields: dict[str, Any], verdict: str, taken_back: list[str]) -> None:
    after = msgspec.structs.replace(SPEC, **fields)
    assert judge_change(SPEC, after) == verdict
    assert overridden(SPEC, after) == taken_back


def test_an_engine_takes_up_what_it_can_and_makes_place_for_what_it_cannot(
    supervisor: EngineSupervisor, fleet: FleetClient, store: redis.Redis, keys: Keys, checkpoint: Path
) -> None:
    deploy(store, keys, checkpoint)
    supervisor.start()
    first = fleet.until_state("gpu-0", "ready")
    assert supervisor.control("set_batch_size", {"max_batch_size": 3})["ok"]
    deploy(store, keys, checkpoint, mode="dynamic", sizing="balanced", sizing_params={"initial": 5})
    fleet.until(lambda: (s := read_status(fleet)).mode == "dynamic" and s.sizing == "balanced")
    assert (read_status(fleet).pid, read_status(fleet).max_batch_size) == (first.pid, 5)
    for i in range(12):
        fleet.submit(f"r{i}", [5, 6 + i], 100)
    fleet.until(lambda: fleet.answers["r0"].token_ids)
    deploy(store, keys, checkpoint, max_model_len=128)
    fleet.until_finished()
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.pid != first.pid and s.state == "ready")
    status = read_status(fleet)
    assert (status.mode, status.max_batch_size, status.restarts) == ("continuous", 8, {})
    assert {answer.finish.reason for answer in fleet.answers.values() if answer.finish} == {"length"}
    fleet.submit("too long now", [5] * 100, 100)
    fleet.until_finished()
    finish = fleet.answers["too long now"].finish
    assert finish is not None
    assert finish.error_code == "context_length_exceeded"


def test_what_an_engine_can_take_up_does_not_begin_its_load_anew(
    supervisor: EngineSupervisor, fleet: FleetClient, store: redis.Redis, keys: Keys, checkpoint: Path
) -> None:
    deploy(store, keys, checkpoint)
    supervisor.start()
    fleet.until(engine_pids)
    (loading,) = engine_pids()
    deploy(store, keys, checkpoint, mode="dynamic")
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.state == "ready" and s.mode == "dynamic")
    assert read_status(fleet).pid == loading


def test_a_sizing_that_no_engine_could_use_is_refused_before_there_is_one(supervisor: EngineSupervisor) -> None:
    assert supervisor.control("sizing", {"name": "balanced"})["ok"]
    assert "no sizing strategy" in supervisor.control("sizing", {"name": "warp"})["error"]
    assert not supervisor.control("deployment", {})["ok"]


def test_an_engine_takes_up_what_operators_want_of_it_though_nobody_told_its_worker(
    supervisor: EngineSupervisor, fleet: FleetClient, store: redis.Redis, keys: Keys, checkpoint: Path
) -> None:
    def want(**fields: Any) -> None:
        store.hset(keys.plan, "gpu-0", msgspec.json.encode(PlannedReplica(name="gpu-0", **fields)))

    deploy(store, keys, checkpoint)
    size = ("set_batch_size", {"max_batch_size": 3})
    want(commands={"batch size": size})
    supervisor.start()
    first = fleet.until_state("gpu-0", "ready")
    fleet.until(lambda: read_status(fleet).max_batch_size == 3)
    want(commands={"batch size": size, "gate": ("pause", {}), "other": ("reboot", {})})
    fleet.until_state("gpu-0", "paused")
    assert supervisor.control("resume", {})["ok"]
    want(commands={"batch size": size, "gate": ("resume", {})})
    # A change of the deployment takes the order back, in the plan first.
    before = first.settings
    want(commands={"gate": ("resume", {})})
    deploy(store, keys, checkpoint, max_batch_size=6)
    fleet.until(lambda: read_status(fleet).max_batch_size == 6 and read_status(fleet).settings != before)
    status = read_status(fleet)
    assert (status.pid, status.state, status.max_batch_size) == (first.pid, "ready", 6)
