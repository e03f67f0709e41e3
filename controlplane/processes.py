"""The processes of a system: their commands, and how long each may take to stop."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from controlplane.config import Config
from inference.plan import Device
from inference.reconcile import Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """A command to keep running."""

    name: str
    command: list[str]
    num_processes: int = 1
    stop_s: float = 6.0
    """After this long the process is killed."""
    environment: dict[str, str] = field(default_factory=dict)


def _bound(signal: str, *command: str) -> list[str]:
    """The command, tied to the life of the supervisor."""
    return [sys.executable, "-m", "controlplane.child", signal, str(os.getpid()), *command]


def redis_process() -> ProcessSpec:
    """The embedded server. It ties itself to the supervisor, and stops after everything else."""
    return ProcessSpec(name="redis", command=[sys.executable, "manage.py", "run_redis"], stop_s=2.0)


def web_process(config: Config, listen_fd: int) -> ProcessSpec:
    """Web processes that share one listening socket: connections wait in it while one restarts."""
    command = _bound("SIGKILL", sys.executable, "-m", "controlplane.webserver", str(listen_fd))
    return ProcessSpec(name="web", command=command, num_processes=config.web_processes)


def _celery(*options: str) -> list[str]:
    worker = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "controlplane",
        "--quiet",
        "worker",
        "--pool=threads",
        "--without-mingle",
        "--without-gossip",  # nobody asks what workers tell each other, and each reads what all of them say
    ]
    return _bound("SIGKILL", *worker, *options)


# Celery warns root of pickle, which it may not use here (`accept_content` is JSON alone).
CELERY_ENVIRONMENT = {"PYTHONWARNINGS": "ignore:You're running the worker with superuser privileges"}


def own_replicas(config: Config, devices: Iterable[Device] = ()) -> list[Wanted]:
    """The gpu workers that the settings ask for; several go to the GPUs among `devices` in turn.

    Where the settings name a device, all of them go there.
    """
    gpus = [device.name for device in devices if device.name != "cpu"]
    is_free = config.num_gpu_processes > 1 and len(gpus) > 1 and config.device in ("auto", "cuda")
    places = gpus if is_free else [config.device]
    names = [config.replica, *(f"{config.replica.removesuffix('-0')}-{n}" for n in range(1, config.num_gpu_processes))]
    return [
        Wanted(
            name=name,
            model=config.models[number % len(config.models)],
            device=places[number % len(places)],
            own=True,
        )
        for number, name in enumerate(names[: config.num_gpu_processes])
    ]


def gpu_process(config: Config, replica: Wanted) -> ProcessSpec:
    """A Celery worker that owns an engine process. It drains before it stops."""
    options = ("-n", f"gpu.{replica.name}@%h", "-Q", "gpu", "--concurrency=2", f"--loglevel={config.log_level}")
    environment = {"PENSTOCK_REPLICA": replica.name, "PENSTOCK_MODEL": replica.model, **CELERY_ENVIRONMENT}
    as_set = replica.own and replica.device == config.device
    return ProcessSpec(
        name=replica.name,
        command=_celery(*options),
        stop_s=config.drain_s + 2.5,
        environment=environment if as_set else environment | _placement(replica.device),
    )


def _placement(device: str) -> dict[str, str]:
    """What makes a worker take this device alone. By its UUID, since CUDA and NVML may number GPUs differently."""
    if device.startswith(("GPU-", "MIG-")):
        return {"CUDA_VISIBLE_DEVICES": device, "PENSTOCK_DEVICE": "cuda", "PENSTOCK_GPU": device}
    return {"PENSTOCK_DEVICE": device, "PENSTOCK_GPU": ""}


OPS_THREADS = 10
"""More than there are kinds of tasks that may last (what-if replays, batches, history, sums, and what deletes old rows
and files), each of which takes one at most (`inference/alone.py`): the sweeper and settling always find one."""


def ops_process(config: Config) -> ProcessSpec:
    """The Celery worker with beat: historian, sweeper, reconciliation."""
    options = ("-n", "ops@%h", "-Q", "ops", "-B", f"--concurrency={OPS_THREADS}", f"--loglevel={config.log_level}")
    return ProcessSpec(name="ops", command=_celery(*options), environment=CELERY_ENVIRONMENT)
