"""A real Celery gpu worker: control round trips, an engine that comes back, and a clean end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import redis
from celery import Celery
from celery._state import get_current_app

from inference import control
from inference.messages import DeploymentSpec
from scheduling.keys import Keys
from scheduling.store import execute
from tests.integration.engines import Engines
from tests.integration.fleet import FleetClient
from tests.patience import PATIENCE_S, wait_until

MODEL = Engines.model
ROOT = Path(__file__).parents[2]
SLOW_MS = 5000
"""A command is obeyed between two steps, in milliseconds by the engine's own clock; a starved machine takes longer."""


@pytest.fixture
def worker(redis_url: str, keys: Keys, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {
        "REDIS_URL": redis_url,
        "PENSTOCK_KEY_PREFIX": keys.prefix,
        "PENSTOCK_VAR": str(tmp_path),
        "PENSTOCK_DEVICE": "cpu",
        "PENSTOCK_LEASE_S": "60",
        "PENSTOCK_DRAIN_S": str(PATIENCE_S),
        "DJANGO_SETTINGS_MODULE": "controlplane.settings",
    }
    command = [sys.executable, "-m", "celery", "-A", "controlplane", "worker", "-n", "gpu.gpu-7@%h"]
    command += ["--pool", "threads", "--concurrency", "1", "--loglevel", "INFO", "--without-mingle", "--without-gossip"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


@pytest.fixture
def app(redis_url: str, keys: Keys) -> Iterator[Celery]:
    """A client's Celery app with the same broker as the worker's."""
    app = Celery("penstock", broker=redis_url.replace("unix://", "redis+socket://"), set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": f"{keys.prefix}:celery:"}
    before = get_current_app()
    app.set_current()
    yield app
    before.set_current()
    app.close()


def deploy(store: redis.Redis, keys: Keys, path: Path) -> None:
    spec = DeploymentSpec(name=MODEL, path=str(path), max_batch_size=8, kv_memory_bytes=32 * 2**20, created_s=1)
    store.hset(keys.deployments, MODEL, msgspec.json.encode(spec))


def engine_of(worker: subprocess.Popen[bytes]) -> psutil.Process:
    return next(child for child in psutil.Process(worker.pid).children() if "inference.worker" in child.cmdline())


def tell(command: Any, **arguments: Any) -> dict[str, Any]:
    """What the worker answers to a command, once it listens."""

    def ask() -> dict[str, Any] | None:
        ack = control.send_control(["gpu-7"], command, timeout_s=10, **arguments)["gpu-7"]
        return None if str(ack["error"]).startswith("No answer") else ack

    ack = wait_until(ask)
    assert ack is not None
    return ack


def test_a_gpu_worker_serves_answers_commands_and_drains(
    worker: subprocess.Popen[bytes],
    app: Celery,
    fleet: FleetClient,
    store: redis.Redis,
    keys: Keys,
    long_checkpoint: Path,
) -> None:
    deploy(store, keys, long_checkpoint)
    fleet.until_state("gpu-7", "ready")
    for i in range(16):
        fleet.submit(f"r{i}", [5, 6 + i], 2000)
    fleet.until(lambda: fleet.answers["r0"].token_ids)
    applied_ms = [tell("policy", revision=3, name="fair")["applied_ms"] for _ in range(9)]
    assert 0 < min(applied_ms) < 100
    assert max(applied_ms) < SLOW_MS
    fleet.read()
    assert not all(answer.finish for answer in fleet.answers.values()), "it waited for the batch"
    assert not tell("set_mode", mode="warp")["ok"]
    assert control.send_control(["gpu-7", "gpu-8"], "pause", timeout_s=0.3)["gpu-8"]["error"]
    assert tell("resume")["state"] == "ready"
    fleet.until_finished()
    for i in range(40):
        fleet.submit(f"s{i}", [5, 6 + i], 3000)  # long enough for a drain to be seen
    fleet.until(lambda: fleet.answers["s0"].token_ids)
    engine = engine_of(worker)
    worker.send_signal(signal.SIGTERM)
    fleet.until_state("gpu-7", "draining")
    told = tell("policy", revision=4)
    assert told["ok"]
    assert told["applied_ms"] < SLOW_MS
    assert worker.wait(PATIENCE_S) == 0
    assert not engine.is_running()
    fleet.read()
    assert all(answer.finish for answer in fleet.answers.values() if answer.token_ids)
    snapshot = execute(store, fleet.queue.snapshot())
    num_waiting = sum(not answer.token_ids for answer in fleet.answers.values())
    assert (snapshot.running, snapshot.depth) == (0, num_waiting)


def test_a_killed_engine_is_noticed_at_once_and_comes_back_as_it_was_told_to_be(
    worker: subprocess.Popen[bytes],
    app: Celery,
    fleet: FleetClient,
    store: redis.Redis,
    keys: Keys,
    long_checkpoint: Path,
) -> None:
    deploy(store, keys, long_checkpoint)
    first = fleet.until_state("gpu-7", "ready")
    assert tell("set_batch_size", max_batch_size=3)["ok"]
    for i in range(6):
        fleet.submit(f"r{i}", [5, 6 + i], 200)
    fleet.until(lambda: fleet.answers["r0"].token_ids)
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: [c for c in psutil.Process(worker.pid).children() if c.pid != first.pid], "no engine is started")
    fleet.until_finished()
    fleet.until(lambda: (s := fleet.status("gpu-7")) is not None and s.pid != first.pid and s.max_batch_size == 3)
    engine = engine_of(worker)
    fleet.submit("long", [5, 6], 4000)
    fleet.until(lambda: fleet.answers["long"].token_ids)
    worker.send_signal(signal.SIGINT)
    worker.wait(PATIENCE_S)
    fleet.read()
    assert not fleet.answers["long"].finish, "Ctrl-C does not wait for what runs"
    assert not engine.is_running()


def test_a_gpu_worker_waits_for_a_deployment_and_takes_a_mended_one(
    worker: subprocess.Popen[bytes],
    fleet: FleetClient,
    store: redis.Redis,
    keys: Keys,
    long_checkpoint: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    deploy(store, keys, broken)
    status = fleet.until_state("gpu-7", "failed")
    assert str(broken) in status.detail
    deploy(store, keys, long_checkpoint)
    fleet.until_state("gpu-7", "ready")
    engine = engine_of(worker)
    worker.kill()
    worker.wait(PATIENCE_S)
    engine.wait(PATIENCE_S)
