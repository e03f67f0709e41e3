"""A machine's supervisor with real processes: they become what the plan wants, whatever happens to them or to it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import redis

from controlplane.config import load_config
from controlplane.processes import gpu_process, own_replicas
from inference.plan import Device, Machine, Plan, PlannedReplica, RunningReplica, encode_plan
from inference.reconcile import pause_s
from scheduling.keys import Keys
from tests.nvml import SECOND_UUID, UUID, WHOLE, StandIn, build_library
from tests.patience import wait_until

ROOT = Path(__file__).parents[2]


class LightMachine:
    """The supervisor's process, the plan that it reads, and what it reports."""

    def __init__(self, store: redis.Redis, keys: Keys, redis_url: str, folder: Path) -> None:
        self._store = store
        self._keys = keys
        self._revision = 0
        self._environment = os.environ | {
            "REDIS_URL": redis_url,
            "PENSTOCK_KEY_PREFIX": keys.prefix,
            "PENSTOCK_VAR": str(folder),
            "PENSTOCK_MACHINE": "here",
            "PENSTOCK_DEVICE": "cpu",
            "PENSTOCK_DRAIN_S": "0",
            "DJANGO_SETTINGS_MODULE": "controlplane.settings",
        }

    @contextmanager
    def running(self, others: dict[str, str] | None = None, **settings: str) -> Iterator[subprocess.Popen[str]]:
        """`others`: environment variables that are no settings."""
        environment = self._environment | {f"PENSTOCK_{name}": value for name, value in settings.items()}
        environment |= others or {}
        command = [sys.executable, "-m", "tests.integration.light_machine"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)

    def want(self, *replicas: PlannedReplica) -> int:
        """Publish a plan; its revision."""
        self._revision += 1
        fields = encode_plan(Plan(revision=self._revision, replicas={replica.name: replica for replica in replicas}))
        with self._store.pipeline(transaction=True) as pipe:
            pipe.delete(self._keys.plan)
            for name, packed in fields.items():
                pipe.hset(self._keys.plan, name, packed)
            pipe.execute()
        return self._revision

    def lose_plan(self) -> None:
        self._store.delete(self._keys.plan)

    def report(self) -> Machine | None:
        packed: Any = self._store.get(self._keys.machine("here"))
        return None if packed is None else msgspec.msgpack.decode(packed, type=Machine)

    def replica(self, name: str) -> RunningReplica | None:
        machine = self.report()
        return next((r for r in machine.replicas if r.name == name), None) if machine else None

    def until(self, name: str, condition: Callable[[RunningReplica], object]) -> RunningReplica:
        found = wait_until(lambda: r if (r := self.replica(name)) and condition(r) else None, self.report)
        assert found is not None
        return found

    def until_running(self, name: str, *, not_pid: int = 0) -> int:
        """The pid of a replica's process."""
        return self.until(name, lambda r: r.state == "running" and r.pid not in (0, not_pid)).pid

    def until_gone(self, name: str) -> None:
        wait_until(lambda: self.report() is not None and self.replica(name) is None, self.report)


@pytest.fixture
def machine(store: redis.Redis, keys: Keys, redis_url: str, tmp_path: Path) -> LightMachine:
    return LightMachine(store, keys, redis_url, tmp_path)


def wanted(name: str, **fields: Any) -> PlannedReplica:
    return PlannedReplica(**({"name": name, "model": "demo", "machine": "here", "device": "cpu"} | fields))


def test_workers_become_what_the_plan_wants_whatever_happens_to_them_or_to_it(machine: LightMachine) -> None:
    with machine.running(GPU_WORKERS="1") as supervisor:
        own = machine.until_running("gpu-0")
        machine.want(wanted("gpu-1"), wanted("gpu-2", machine="there"))
        first = machine.until_running("gpu-1")
        psutil.Process(first).kill()
        second = machine.until_running("gpu-1", not_pid=first)
        machine.want(wanted("gpu-1", generation=1))
        third = machine.until_running("gpu-1", not_pid=second)
        assert not psutil.pid_exists(second)
        assert machine.replica("gpu-2") is None
        # A plan that Redis lost is no plan to stop everything.
        machine.lose_plan()
        seen = machine.report()
        wait_until(lambda: seen and (now := machine.report()) and now.time_s > seen.time_s + 1)
        assert (machine.until_running("gpu-0"), machine.until_running("gpu-1")) == (own, third)
        supervisor.kill()
        supervisor.wait(30)
    wait_until(lambda: not psutil.pid_exists(third) and not psutil.pid_exists(own))
    # What changes while nobody supervises comes about when somebody does again.
    revision = machine.want(wanted("gpu-0", model="", wanted="stopped"), wanted("gpu-3"))
    with machine.running(GPU_WORKERS="1"):
        last = machine.until_running("gpu-3")
        machine.until("gpu-0", lambda r: r.state == "stopped")
        machine.until_gone("gpu-1")
        report = machine.report()
        assert report is not None
        assert (report.revision, [device.name for device in report.devices]) == (revision, ["cpu"])
    assert not psutil.pid_exists(last)
    assert machine.report() is None


def test_several_workers_of_the_settings_are_spread_over_the_gpus_that_are_visible(
    machine: LightMachine, tmp_path: Path
) -> None:
    stand_in = StandIn(tmp_path / "nvml")
    stand_in.say(**WHOLE, second_uuid=SECOND_UUID)
    gpus = {"NVML_STAND_IN": str(stand_in.path), "LD_LIBRARY_PATH": str(build_library(tmp_path).parent)}
    with machine.running(gpus, GPU_WORKERS="3", DEVICE="auto"):
        for name, device in (("gpu-0", UUID), ("gpu-1", SECOND_UUID), ("gpu-2", UUID)):
            machine.until(name, lambda r, device=device: r.state == "running" and r.device == device)  # type: ignore[misc]
    with machine.running(gpus | {"CUDA_VISIBLE_DEVICES": SECOND_UUID}, GPU_WORKERS="2", DEVICE="auto"):
        machine.until("gpu-1", lambda r: r.state == "running" and r.device == "auto")
    with machine.running(gpus, GPU_WORKERS="1", DEVICE="auto"):
        machine.until("gpu-0", lambda r: r.state == "running" and r.device == "auto")


def test_a_worker_that_has_a_gpu_of_its_own_sees_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_GPU_WORKERS", "2")
    config = load_config()
    devices = [Device(name=name, label="", memory_total_bytes=1, memory_free_bytes=1) for name in (UUID, SECOND_UUID)]
    first, second = (gpu_process(config, own).environment for own in own_replicas(config, devices))
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == (UUID, SECOND_UUID)
    assert {place["PENSTOCK_DEVICE"] for place in (first, second)} == {"cuda"}
    assert all("PENSTOCK_DEVICE" not in gpu_process(config, own).environment for own in own_replicas(config))
    monkeypatch.setenv("PENSTOCK_DEVICE", "cuda:1")
    assert [own.device for own in own_replicas(load_config(), devices)] == ["cuda:1", "cuda:1"]


def test_one_that_does_not_stay_up_is_tried_ever_less_often_and_says_so(machine: LightMachine) -> None:
    machine.want(wanted("gpu-1", model="broken"))
    with machine.running(GPU_WORKERS="0"):
        failed = machine.until("gpu-1", lambda r: r.state == "waiting" and r.num_failures >= 3)
        pause = pause_s(failed.num_failures)
        assert pause >= 2
        assert failed.until_s is not None
        assert failed.until_s - failed.since_s == pytest.approx(pause, abs=0.01)
        assert failed.detail.startswith("Its process ended with 3 after")
        assert failed.detail.endswith(f"{failed.num_failures} times in a row; it is started again in {pause:g} s.")
        machine.want(wanted("gpu-1"))
        machine.until_running("gpu-1")


def test_one_that_does_not_end_is_killed_when_its_time_is_up(machine: LightMachine) -> None:
    machine.want(wanted("gpu-1", model="stubborn"))
    with machine.running(GPU_WORKERS="0"):
        pid = machine.until_running("gpu-1")
        machine.want(wanted("gpu-1", model="stubborn", wanted="stopped", drain_s=0.1))
        draining = machine.until("gpu-1", lambda r: r.state == "stopping")
        assert (draining.pid, draining.drain_s) == (pid, 0.1)
        machine.until_gone("gpu-1")
        assert not psutil.pid_exists(pid)


def test_of_two_supervisors_by_one_name_the_first_alone_follows_the_plan(
    machine: LightMachine, tmp_path_factory: pytest.TempPathFactory
) -> None:
    machine.want(wanted("gpu-1"))
    with machine.running(GPU_WORKERS="0") as first:
        machine.until_running("gpu-1")
        elsewhere = str(tmp_path_factory.mktemp("elsewhere"))
        with machine.running(GPU_WORKERS="0", VAR=elsewhere) as second:
            assert second.stdout is not None
            assert "Give this one a PENSTOCK_MACHINE of its own" in second.stdout.readline()
            assert len(psutil.Process(first.pid).children()) == 1
            assert psutil.Process(second.pid).children() == []
        assert machine.report() is not None
