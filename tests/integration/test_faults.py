"""A worker whose engine process hangs, or whose GPU is lost: what runs goes on, and the status says what happened."""

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from inference.messages import DeploymentSpec
from inference.worker.supervisor import EngineSupervisor, SupervisorOptions
from scheduling.keys import Keys
from scheduling.store import execute
from tests.integration.engines import COMMAND, Engines
from tests.integration.fleet import FleetClient
from tests.nvml import LOST, UUID, WHOLE, StandIn, build_library
from tests.patience import PATIENCE_S

STEP_TIMEOUT_S = 4.0


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, long_checkpoint: Path) -> FleetClient:
    spec = DeploymentSpec(name=Engines.model, path=str(long_checkpoint), max_batch_size=8, kv_memory_bytes=32 * 2**20)
    store.hset(keys.deployments, Engines.model, msgspec.json.encode(spec))
    return FleetClient(store, keys, Engines.model)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    build_library(tmp_path)
    stand_in = StandIn(tmp_path / "nvml")
    monkeypatch.setenv("NVML_STAND_IN", str(stand_in.path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    return stand_in


@pytest.fixture
def worker(redis_url: str, keys: Keys, request: pytest.FixtureRequest) -> Iterator[EngineSupervisor]:
    """A gpu worker's supervisor with a real engine process; the parameter names the GPU that it watches."""
    options = SupervisorOptions(
        command=COMMAND,
        replica="gpu-0",
        redis_url=redis_url,
        key_prefix=keys.prefix,
        device="cpu",
        lease_s=3600.0,  # so that none runs out by itself
        gpu=getattr(request, "param", ""),
        step_timeout_s=STEP_TIMEOUT_S,
    )
    supervisor = EngineSupervisor(options)
    supervisor.start()
    yield supervisor
    supervisor.close(0)
    supervisor.join(PATIENCE_S)
    assert not supervisor.is_alive()


def detail(fleet: FleetClient) -> str:
    status = fleet.status("gpu-0")
    return status.detail if status is not None else ""


def restarts(fleet: FleetClient) -> dict[str, int]:
    status = fleet.status("gpu-0")
    return status.restarts if status is not None and status.state == "ready" else {}


def test_an_engine_that_cannot_be_started_is_tried_again_until_it_can(
    redis_url: str, keys: Keys, fleet: FleetClient, tmp_path: Path
) -> None:
    command = tmp_path / "engine"
    options = SupervisorOptions(
        command=[str(command)], replica="gpu-0", redis_url=redis_url, key_prefix=keys.prefix, device="cpu"
    )
    supervisor = EngineSupervisor(options)
    supervisor.start()
    fleet.until(lambda: "cannot be started" in detail(fleet))
    aside = tmp_path / "aside"
    aside.write_text(f"#!/bin/sh\nexec {shlex.join(COMMAND)}\n")
    aside.chmod(0o700)
    aside.rename(command)
    fleet.until_state("gpu-0", "ready")
    supervisor.close(0)
    supervisor.join(PATIENCE_S)
    assert not supervisor.is_alive()


def test_a_hung_engine_is_killed_and_started_again_and_its_requests_go_on(
    worker: EngineSupervisor, fleet: FleetClient
) -> None:
    first = fleet.until_state("gpu-0", "ready")
    # An engine with nothing to do says that it lives, for longer than a step may take.
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.time_s > first.time_s + STEP_TIMEOUT_S + 1)
    status = fleet.status("gpu-0")
    assert status is not None
    assert (status.pid, status.state) == (first.pid, "ready")
    for i in range(6):
        fleet.submit(f"calm-{i}", [5, 6 + i], 400)
    fleet.until_finished()
    for i in range(6):
        fleet.submit(f"hung-{i}", [5, 6 + i], 400)
    fleet.until(lambda: all(answer.token_ids for answer in fleet.answers.values()))
    os.kill(first.pid, signal.SIGSTOP)
    fleet.until(lambda: "has ended no step for 4 s and is killed" in detail(fleet))
    fleet.until(lambda: restarts(fleet) == {"hung": 1})
    fleet.until_finished()
    for i in range(6):
        calm, hung = fleet.answers[f"calm-{i}"], fleet.answers[f"hung-{i}"]
        assert (hung.token_ids, hung.text) == (calm.token_ids, calm.text)


@pytest.mark.parametrize("worker", [UUID], indirect=True)
def test_a_lost_gpu_takes_the_replica_out_until_it_returns(
    gpu: StandIn, worker: EngineSupervisor, fleet: FleetClient, store: redis.Redis
) -> None:
    status = fleet.until_state("gpu-0", "ready")
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.telemetry and s.telemetry.source == "nvml")
    for i in range(4):
        fleet.submit(f"r{i}", [5, 6 + i], 3000)
    fleet.until(lambda: all(answer.token_ids for answer in fleet.answers.values()))
    gpu.say(**WHOLE, error=LOST)
    fleet.until(lambda: f"GPU {UUID} is lost" in detail(fleet) and "comes back when it does" in detail(fleet))
    status = fleet.until_state("gpu-0", "failed")
    assert status.restarts == {"lost": 1}
    assert status.telemetry is not None
    assert status.telemetry.lost
    waiting = execute(store, fleet.queue.snapshot())
    assert (waiting.running, waiting.depth) == (0, sum(not answer.finish for answer in fleet.answers.values()))
    assert waiting.depth
    gpu.say(**WHOLE)
    fleet.until(lambda: restarts(fleet) == {"lost": 1})
    fleet.until_finished()
    assert {answer.finish.reason for answer in fleet.answers.values() if answer.finish} == {"length"}
    assert max(max(answer.attempts) for answer in fleet.answers.values()) == 2
