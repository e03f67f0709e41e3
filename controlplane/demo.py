"""The demo's tenants, keys, operator and model: made once, with random secrets that are kept in `var/demo.env`."""

import fcntl
import hashlib
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from django.contrib.auth.models import Group, User
from django.db import transaction

from controlplane.config import ROOT, Config
from inference.demo.stamp import is_trained
from inference.models import ModelDeployment
from inference.services import register_deployment, register_upstream
from inference.upstream.address import check_address
from scheduling.core.request import Priority
from scheduling.credentials import digest_key
from scheduling.models import ApiKey, ServiceLevel, Tenant
from scheduling.services import config_changed, create_key, create_tenant

OPERATOR = "operator"
MODEL = "penstock-demo"


@dataclass(frozen=True, slots=True)
class DemoTenant:
    """A team of the demo: its share under the fair policy, and the priority its requests usually have."""

    name: str
    display_name: str
    weight: float
    max_priority: Priority
    usual_priority: Priority


TENANTS = (
    DemoTenant("checkout", "Shop checkout", 4.0, Priority.CRITICAL, Priority.REALTIME),
    DemoTenant("support", "Customer support", 2.0, Priority.HIGH, Priority.HIGH),
    DemoTenant("research", "Research", 1.0, Priority.NORMAL, Priority.NORMAL),
    DemoTenant("nightly", "Nightly reports", 1.0, Priority.NORMAL, Priority.BULK),
)


TARGETS = (
    (Priority.CRITICAL, 1_000, 250, 99.0),
    (Priority.REALTIME, 1_500, 250, 99.0),
    (Priority.HIGH, 3_000, 400, 97.0),
    (Priority.NORMAL, 8_000, 500, 95.0),
    (Priority.LOW, 20_000, 1_000, 90.0),
    (Priority.BULK, 120_000, 2_000, 90.0),
)
"""For everybody, by priority: milliseconds to the first token and per further one, and the objective in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What the demo's users need to get in."""

    password: str
    """Empty where somebody has given the operator another one."""
    keys: dict[str, str]
    """Tenant -> API key."""


def secrets_path(config: Config) -> Path:
    """The file that only this user can read."""
    return config.var / "demo.env"


def _read_values(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line and line[0] != "#")


def read_secrets(config: Config) -> Secrets | None:
    """The kept secrets; None where there are none, as on a system that was set up by hand."""
    path = secrets_path(config)
    if not path.exists():
        return None
    values = _read_values(path)
    keys = {name.removeprefix("KEY_").lower(): value for name, value in values.items() if name.startswith("KEY_")}
    return Secrets(password=values.get("OPERATOR_PASSWORD", ""), keys=keys)


def _database_mark(config: Config) -> str:
    return hashlib.sha256(config.database_url.encode()).hexdigest()[:8]


def _choose_secrets(config: Config) -> None:
    """Put this database's secrets in place; those of another one stand aside until that is used again."""
    path, mine = secrets_path(config), _database_mark(config)
    if path.exists() and (other := _read_values(path).get("DATABASE", mine)) != mine:
        path.rename(path.with_name(f"demo-{other}.env"))
    kept = path.with_name(f"demo-{mine}.env")
    if kept.exists() and not path.exists():
        kept.rename(path)


def _write_secrets(config: Config, values: Secrets) -> None:
    lines = [
        "# Made by `make up`: the demo's secrets. The database holds only their hashes.",
        f"DATABASE={_database_mark(config)}",
        f"OPERATOR_NAME={OPERATOR}",
        f"OPERATOR_PASSWORD={values.password}",
        *(f"KEY_{tenant.upper()}={key}" for tenant, key in values.keys.items()),
    ]
    path = secrets_path(config)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")


def prepare_accounts(config: Config) -> Secrets | None:
    """Make the demo's accounts where they are missing. None on a system with tenants of its own and no demo."""
    _choose_secrets(config)
    kept = read_secrets(config)
    if kept is None and Tenant.objects.exists():
        return None
    known = kept or Secrets(password="", keys={})
    with transaction.atomic():
        password = _prepare_operator(known.password)
        keys = {tenant.name: _prepare_tenant(tenant, known.keys.get(tenant.name, "")) for tenant in TENANTS}
        made = Secrets(password=password, keys=keys)
        if made != kept:
            _write_secrets(config, made)
            _prepare_targets()
    return made if User.objects.get(username=OPERATOR).check_password(made.password) else replace(made, password="")


def _prepare_operator(known: str) -> str:
    """The operator's password: the known one as long as there is one and the user exists."""
    user, created = User.objects.get_or_create(username=OPERATOR, defaults={"is_staff": True})
    if not created and known:
        return known
    password = secrets.token_urlsafe(12)
    user.set_password(password)
    user.is_superuser = user.is_staff = True
    user.save()
    user.groups.add(Group.objects.get(name="operator"))
    return password


def _prepare_tenant(wanted: DemoTenant, known: str) -> str:
    """The tenant's key: the known one as long as the database has its digest."""
    if known and ApiKey.objects.filter(digest=digest_key(known)).exists():
        return known
    tenant = Tenant.objects.filter(name=wanted.name).first() or create_tenant(
        name=wanted.name, display_name=wanted.display_name, weight=wanted.weight, max_priority=wanted.max_priority
    )
    return create_key(tenant=tenant, name="demo")


def _prepare_targets() -> None:
    """Default service levels where there are none of any kind; without them no figure of an SLA says anything."""
    if not ServiceLevel.objects.exists():
        for priority, ttft_ms, tpot_ms, objective in TARGETS:
            ServiceLevel.objects.create(
                priority=priority, ttft_ms=ttft_ms, tpot_ms=tpot_ms, objective_percent=objective
            )
        config_changed()


def model_folder(config: Config) -> Path:
    """Where the demo model is kept."""
    return config.var.resolve() / "models" / "demo"


def train_model(config: Config) -> None:
    """Train the demo model, unless it is there or other models take its place. Raises CalledProcessError."""
    folder = model_folder(config)
    paths = set(ModelDeployment.objects.values_list("path", flat=True))
    if ((paths or config.upstream) and str(folder) not in paths) or is_trained(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "training.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the folder may be shared: containers of workers that start at once
        if is_trained(folder):
            return
        # Its own process, so that the supervisor never loads torch.
        # Threads that wait must not spin: on a machine that is busy they would take the time of those that work.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "inference.demo.train", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)


def offer_upstream(config: Config) -> None:
    """Register the server that PENSTOCK_UPSTREAM names, unless it is offered so already.

    Raises ValidationError or AddressError.
    """
    if not config.upstream:
        return
    name, model, url = config.upstream_parts
    known = ModelDeployment.objects.filter(name=name, upstream_url=check_address(url), upstream_model=model)
    if not known.exists():
        register_upstream(name=name, url=url, upstream_model=model, reason="PENSTOCK_UPSTREAM")


def offer_model(config: Config) -> None:
    """Register the demo model where there is none at all. Raises CheckpointError."""
    if not ModelDeployment.objects.exists():
        register_deployment(name=MODEL, path=model_folder(config))
