"""What `manage.py doctor` looks at: each check says how things stand and, where that is bad, what mends it."""

import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import redis
from celery import current_app
from django.contrib.auth.models import User
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor
from kombu.exceptions import OperationalError

from controlplane.config import ROOT, Config
from controlplane.offline import is_web
from controlplane.preflight import MIN_REDIS
from inference.checkpoint import CheckpointError, inspect_checkpoint
from inference.messages import ReplicaStatus
from inference.models import ModelDeployment
from inference.services import read_replicas
from scheduling.keys import Keys
from scheduling.store import connect

Level = Literal["ok", "warn", "fail"]
PATIENCE_S = 3
MAX_CLOCK_S = 1.0
"""Clocks of the machines may differ by this much before deadlines and waits look wrong."""
MIN_DISK_BYTES = 2 * 2**30
MAX_HISTORY = 10_000
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How one thing stands; `mend` is an order to the reader, empty where all is well."""

    name: str
    level: Level
    detail: str
    mend: str = ""


def _ok(name: str, detail: str) -> Finding:
    return Finding(name=name, level="ok", detail=detail)


def _warn(name: str, detail: str, mend: str) -> Finding:
    return Finding(name=name, level="warn", detail=detail, mend=mend)


def _fail(name: str, detail: str, mend: str) -> Finding:
    return Finding(name=name, level="fail", detail=detail, mend=mend)


def examine(config: Config) -> Iterator[Finding]:
    """All checks, one after the other. What depends on a database or a Redis that is away is left out."""
    yield from check_versions()
    yield from check_secrets(config)
    yield from check_disk(config)
    database = list(check_database(config))
    yield from database
    redis_findings = list(check_redis(config))
    yield from redis_findings
    if all(finding.level != "fail" for finding in database):
        yield from check_accounts()
        yield from check_checkpoints(config)
    if redis_findings[0].level != "fail":
        with connect(config.redis, socket_timeout=PATIENCE_S) as client:
            yield from check_clocks(config, client)
            yield from check_workers(config, client)


def check_versions() -> Iterator[Finding]:
    """Python, and the packages that requirements.txt pins."""
    python = ".".join(map(str, sys.version_info[:3]))
    wrong = [
        f"{name} {have or 'is missing'} (wanted {want})" for name, want in _pins() if (have := _installed(name)) != want
    ]
    if wrong:
        yield _warn("versions", f"Python {python}; {', '.join(wrong[:5])}.", "Run `make setup` again.")
    else:
        yield _ok("versions", f"Python {python}, all packages as pinned.")
    if not shutil.which("cc"):
        yield _warn(
            "compiler",
            "There is no C compiler, so a CPU engine runs without its kernels, several times slower.",
            "On Debian: apt-get install gcc libc6-dev.",
        )


def _pins() -> list[tuple[str, str]]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return [(name.partition("[")[0].strip(), pin.split("#")[0].strip()) for name, _, pin in pins]


def _installed(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""


def check_secrets(config: Config) -> Iterator[Finding]:
    """The secret key, and what makes a reachable host unsafe."""
    shared = bool(config.database_url or config.redis_url)
    path = config.var / "secret_key"
    if config.secret_key and len(config.secret_key) < 32:
        yield _fail("secrets", "PENSTOCK_SECRET_KEY is short.", "Take one of 32 random bytes: openssl rand -hex 32.")
    elif not config.secret_key and shared:
        mend = "Give all machines the same PENSTOCK_SECRET_KEY."
        yield _warn("secrets", "The secret key is this machine's own; sessions end on others.", mend)
    elif not config.secret_key and path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield _fail("secrets", f"Others can read {path}.", f"chmod 600 {path}, and remove it to make a new one.")
    else:
        yield _ok("secrets", "The secret key is set and private.")
    if config.debug:
        yield _fail("exposure", "PENSTOCK_DEBUG shows settings and stack traces to visitors.", "Unset it.")
    if "*" in config.allowed_hosts:
        yield _fail("exposure", "PENSTOCK_ALLOWED_HOSTS lets any name in.", "List the names that are yours.")
    if config.host not in LOOPBACK and not any(o.startswith("https://") for o in config.trusted_origins):
        mend = "Put a proxy with TLS in front, and name its address in PENSTOCK_TRUSTED_ORIGINS."
        yield _warn("exposure", f"{config.host} is reachable without TLS: passwords and keys travel readable.", mend)


def check_disk(config: Config) -> Iterator[Finding]:
    """Room under `var`."""
    usage = shutil.disk_usage(config.var)
    detail = f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.0f} under {config.var}."
    if not os.access(config.var, os.W_OK):
        yield _fail(
            "disk", f"{config.var} cannot be written.", f"chown it to {os.geteuid()}, or name another: PENSTOCK_VAR."
        )
    elif usage.free < MIN_DISK_BYTES:
        yield _warn("disk", detail, "Make room; PENSTOCK_HISTORY_DAYS bounds what history takes.")
    else:
        yield _ok("disk", detail)


def check_database(config: Config) -> Iterator[Finding]:
    """It answers, and has our tables."""
    where = "PostgreSQL" if config.database_url else "SQLite"
    try:
        connection.ensure_connection()
        executor = MigrationExecutor(connection)
        missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    except DatabaseError as error:
        first_line = str(error).strip().splitlines()[0]
        yield _fail("database", f"{where} does not answer: {first_line}", "Start it, or correct DATABASE_URL.")
        return
    if missing:
        names = ", ".join(f"{migration.app_label}.{migration.name}" for migration, _ in missing[:5])
        mend = "Run `.venv/bin/python manage.py migrate`; `make up` does so by itself."
        yield _fail("database", f"{where} lacks {len(missing)} migrations: {names}.", mend)
        return
    yield _ok("database", f"{where}, up to date.")
    if not config.database_url and config.redis_url:
        mend = "Use PostgreSQL (DATABASE_URL) as soon as there is a second machine."
        yield _warn("database", "SQLite serves one machine alone, and Redis may have several.", mend)


def check_redis(config: Config) -> Iterator[Finding]:
    """It answers, is new enough, keeps what it holds, and throws nothing away."""
    try:
        with connect(config.redis, socket_timeout=PATIENCE_S, socket_connect_timeout=PATIENCE_S) as client:
            info: dict[str, Any] = client.info()
    except (redis.RedisError, OSError, ValueError) as error:
        mend = "Start it, or correct REDIS_URL." if config.redis_url else "`make up` starts it."
        yield _fail("redis", f"It does not answer: {str(error).rstrip('.')}.", mend)
        return
    kind = "Valkey" if "valkey_version" in info else "Redis"
    found = str(info.get("valkey_version") or info["redis_version"])
    if tuple(int(part) for part in found.split(".")[:2]) < MIN_REDIS:
        yield _fail("redis", f"{kind} {found} is too old.", "Penstock needs Redis 6.2 or later, or Valkey.")
    else:
        yield _ok("redis", f"{kind} {found}.")
    yield from _check_keeping(info)


def _check_keeping(info: dict[str, Any]) -> Iterator[Finding]:
    if not info.get("aof_enabled"):
        mend = "CONFIG SET appendonly yes, and the same in its configuration."
        yield _warn("redis persistence", "No append-only file: a restart of Redis loses the waiting requests.", mend)
    elif info.get("aof_last_write_status", "ok") != "ok":
        yield _fail("redis persistence", "The append-only file cannot be written.", "Look at Redis's disk and log.")
    else:
        yield _ok("redis persistence", "Append-only file.")
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0))
    if policy != "noeviction" and limit:
        mend = "CONFIG SET maxmemory-policy noeviction."
        yield _fail("redis memory", f"{policy}: when memory runs out, requests vanish.", mend)
    elif limit and used > 0.8 * limit:
        yield _warn("redis memory", f"{used / limit:.0%} of maxmemory are used.", "Raise maxmemory.")
    else:
        yield _ok("redis memory", f"{used / 2**20:.0f} MiB used, nothing is evicted.")


def check_clocks(config: Config, client: redis.Redis) -> Iterator[Finding]:
    """This machine's clock and those of the workers against Redis's, by which leases run."""
    before_s = time.time()
    seconds, microseconds = client.time()
    own_s = abs((before_s + time.time()) / 2 - (seconds + microseconds / 1e6))
    apart = {"this machine": own_s}
    now_s = time.time()
    for replica in read_replicas(client, Keys(config.key_prefix)):
        # A status is up to half a second old, so only what is beyond that is the clock's.
        apart[f"{replica.replica} on {replica.host}"] = max(0.0, abs(now_s - replica.time_s) - 0.5)
    wrong = {name: value for name, value in apart.items() if value > MAX_CLOCK_S}
    if wrong:
        names = ", ".join(f"{name} ({value:.1f} s)" for name, value in wrong.items())
        yield _fail("clocks", f"Apart from Redis's: {names}.", "Let NTP (chrony, systemd-timesyncd) set them.")
    else:
        yield _ok("clocks", f"Within {max(apart.values()):.2f} s of Redis's.")


def check_workers(config: Config, client: redis.Redis) -> Iterator[Finding]:
    """Each kind of process is there, and each model has one that serves it."""
    keys = Keys(config.key_prefix)
    names: list[bytes] = client.zrangebyscore(keys.webs, time.time(), "+inf")  # type: ignore[assignment]
    num_webs = sum(map(is_web, names))
    if num_webs:
        yield _ok("web", f"{num_webs} live.")
    else:
        yield _fail("web", "No web process lives.", "Start one: `manage.py up --only web`, or `make up`.")
    yield from _check_ops(client, keys)
    replicas = read_replicas(client, keys)
    models: list[bytes] = client.hkeys(keys.deployments)  # type: ignore[assignment]
    for model in sorted(name.decode() for name in models):
        yield from _check_model(model, [replica for replica in replicas if replica.model == model])
    for replica in replicas:
        telemetry = replica.telemetry
        if telemetry is not None and telemetry.stale_s:
            yield _warn(
                replica.replica,
                f"Its GPU's driver has been silent for {telemetry.stale_s:.0f} s.",
                "Try nvidia-smi there.",
            )
        elif telemetry is not None and telemetry.source == "host" and telemetry.detail:
            yield _warn(replica.replica, telemetry.detail, "Install the driver's NVML library there.")


def _check_ops(client: redis.Redis, keys: Keys) -> Iterator[Finding]:
    try:
        with current_app.connection_for_write() as broker:
            broker.ensure_connection(max_retries=1, interval_start=0, timeout=PATIENCE_S)
            answers = current_app.control.ping(timeout=1.0, connection=broker) or []
    except (OperationalError, redis.RedisError, OSError):
        answers = []
    num_ops = sum(node.startswith("ops@") for answer in answers for node in answer)
    waiting = int(client.xlen(keys.history))
    if not num_ops:
        mend = "Start one: `manage.py up --only ops`, or `make up`."
        yield _fail("ops", "No ops process answers, so no history is written and nothing is reconciled.", mend)
    elif num_ops > 1:
        yield _warn("ops", f"There are {num_ops}; their periodic work is done twice.", "Run one.")
    elif waiting > MAX_HISTORY:
        yield _warn("ops", f"{waiting} entries of history wait for the database.", "Look at its log and the database.")
    else:
        yield _ok("ops", f"One answers; {waiting} entries of history wait.")


def _check_model(model: str, replicas: list[ReplicaStatus]) -> Iterator[Finding]:
    ready = [replica.replica for replica in replicas if replica.state == "ready"]
    failed = [replica for replica in replicas if replica.state in ("failed", "unhealthy")]
    for replica in failed:
        yield _fail(
            model,
            f"{replica.replica} is {replica.state}: {replica.detail}",
            "Mend what it names; it tries again by itself.",
        )
    if ready:
        yield _ok(model, f"Served by {', '.join(ready)}.")
    elif not failed:
        others = ", ".join(f"{replica.replica} is {replica.state}" for replica in replicas) or "there is no worker"
        mend = f"Start or resume one: `PENSTOCK_MODEL={model} manage.py up --only gpu`."
        yield _warn(model, f"Nobody serves it ({others}); its requests wait.", mend)


def check_accounts() -> Iterator[Finding]:
    """Somebody can administer."""
    if User.objects.filter(is_active=True, is_superuser=True).exists():
        yield _ok("accounts", "There is an active superuser.")
    else:
        yield _warn("accounts", "There is no active superuser.", "Run `.venv/bin/python manage.py createsuperuser`.")


def check_checkpoints(config: Config) -> Iterator[Finding]:
    """Models that are offered can be loaded. A machine that PENSTOCK_MODEL keeps to others may lack one."""
    if not ModelDeployment.objects.filter(enabled=True).exists():
        yield _fail("models", "No model is offered.", "Register one: `manage.py add_model NAME PATH`.")
    inspect: Callable[[Path], object] = inspect_checkpoint
    for deployment in ModelDeployment.objects.filter(enabled=True, backend=ModelDeployment.Backend.BUILTIN):
        path = Path(deployment.path)
        if not path.is_dir():
            mend = "Web, ops and the gpu machines that serve it read it under that very path: copy or mount it."
            level = _fail if config.models == [""] or deployment.name in config.models else _warn
            yield level(deployment.name, f"{path} is not on this machine.", mend)
            continue
        try:
            inspect(path)
        except CheckpointError as error:
            yield _fail(deployment.name, str(error), f"Repair {path}, or `manage.py add_model {deployment.name} PATH`.")
        else:
            yield _ok(deployment.name, f"The checkpoint in {path} is whole.")
