"""The processes of a system: their commands, and how long each may take to stop."""

import os
import sys
from dataclasses import dataclass, field

from controlplane.config import Config


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
    ]
    return _bound("SIGKILL", *worker, *options)


# Celery warns root of pickle, which it may not use here (`accept_content` is JSON alone).
CELERY_ENVIRONMENT = {"PYTHONWARNINGS": "ignore:You're running the worker with superuser privileges"}


def gpu_process(config: Config, number: int) -> ProcessSpec:
    """A Celery worker that owns an engine process. It drains before it stops."""
    model = config.models[number % len(config.models)]
    replica = config.replica if number == 0 else f"{config.replica.removesuffix('-0')}-{number}"
    return ProcessSpec(
        name=replica,
        command=_celery("-n", f"gpu.{replica}@%h", "-Q", "gpu", "--concurrency=2", f"--loglevel={config.log_level}"),
        stop_s=config.drain_s + 2.5,
        environment={"PENSTOCK_REPLICA": replica, "PENSTOCK_MODEL": model, **CELERY_ENVIRONMENT},
    )


def ops_process(config: Config) -> ProcessSpec:
    """The Celery worker with beat: historian, sweeper, reconciliation."""
    options = ("-n", "ops@%h", "-Q", "ops", "-B", "--concurrency=3", f"--loglevel={config.log_level}")
    return ProcessSpec(name="ops", command=_celery(*options), environment=CELERY_ENVIRONMENT)
