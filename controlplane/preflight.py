"""What must hold before anything starts; what does not hold ends in a sentence that says what to do."""

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

import redis
from django.core.management import call_command
from django.db import OperationalError, connection

from controlplane.config import Config
from inference.checkpoint import CheckpointError, inspect_checkpoint
from inference.models import ModelDeployment
from inference.traces import TracesUnavailableError, open_tracer

MIN_REDIS = (6, 2)
MIGRATION_LOCK = 0x50454E53
"""Number of an advisory lock in the database, ours alone."""


class CannotStart(Exception):  # noqa: N818
    """The system cannot start."""


def lock_var(config: Config) -> TextIO:
    """Hold `var` for this supervisor until the returned file is closed."""
    lock = (config.var / "up.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        other = lock.read().strip()
        raise CannotStart(
            f"Penstock runs already on {config.var} (process {other}). Stop it with Ctrl-C in its terminal or "
            f"`kill {other}`, or give this one another folder and port: PENSTOCK_VAR=... PENSTOCK_PORT=..."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def listen(config: Config) -> socket.socket:
    """The socket that the web processes share."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((config.host.strip("[]"), config.port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise CannotStart(
            f"{config.host}:{config.port} cannot be used ({error.strerror}). Stop what listens there, or choose "
            f"another port: PENSTOCK_PORT={config.port + 1} make up"
        ) from None
    sock.set_inheritable(True)
    return sock


def check_redis(config: Config) -> None:
    """Where REDIS_URL names a server: it answers, and is new enough."""
    if not config.redis_url:
        return
    try:
        with redis.Redis.from_url(config.redis_url, socket_connect_timeout=5, socket_timeout=5) as client:
            info = client.info("server")
    except (redis.RedisError, OSError, ValueError) as error:
        raise CannotStart(
            f"The Redis that REDIS_URL names cannot be used: {str(error).rstrip('.')}. Start it or correct the URL; "
            "without REDIS_URL, Penstock runs its own."
        ) from None
    version = str(info.get("valkey_version") or info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_REDIS:
        raise CannotStart(
            f"REDIS_URL names a server of version {version}; Penstock needs Redis 6.2 or later, or Valkey."
        )


def check_traces(config: Config) -> None:
    """Where traces are wanted: the packages are there."""
    try:
        open_tracer(config.traces)
    except TracesUnavailableError as error:
        raise CannotStart(str(error)) from None


def check_database(config: Config) -> None:
    """The database answers."""
    try:
        connection.ensure_connection()
    except OperationalError as error:
        what = "DATABASE_URL names a database that" if config.database_url else f"The SQLite file in {config.var}"
        first_line = str(error).strip().splitlines()[0]
        raise CannotStart(
            f"{what} cannot be used: {first_line} Start it, create it or correct the URL; without DATABASE_URL, "
            "Penstock uses SQLite under var/."
        ) from None


def migrate() -> None:
    """Bring the database's tables up to date; machines that start at the same time do so one after the other."""
    if connection.vendor != "postgresql":  # SQLite's folder is locked for one supervisor
        call_command("migrate", verbosity=0, interactive=False)
        return
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [MIGRATION_LOCK])
        try:
            call_command("migrate", verbosity=0, interactive=False)
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [MIGRATION_LOCK])


def check_checkpoint(config: Config) -> None:
    """The models that gpu workers of this machine will serve exist and can be loaded."""
    if config.gpu_workers:
        for name in config.models:
            _check_model(name)


def _check_model(name: str) -> None:
    deployments = ModelDeployment.objects.filter(enabled=True).order_by("-created_at")
    deployment = deployments.filter(name=name).first() if name else deployments.first()
    if deployment is None:
        names = ", ".join(deployments.values_list("name", flat=True)) or "none"
        raise CannotStart(
            f"PENSTOCK_MODEL names {name}, which is not registered (there is {names}). Register it with "
            f"`.venv/bin/python manage.py add_model {name or 'NAME'} PATH`."
        )
    if deployment.is_upstream:  # which may come later than we do
        return
    try:
        inspect_checkpoint(Path(deployment.path))
    except CheckpointError as error:
        raise CannotStart(
            f"The checkpoint of {deployment.name} cannot be served: {error} To serve another in its place: "
            f"`.venv/bin/python manage.py add_model {deployment.name} PATH`."
        ) from None
