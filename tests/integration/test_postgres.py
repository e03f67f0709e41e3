"""The database tests once more, against a PostgreSQL that is started for them."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from benchmarks.stack import running_stack
from tests.integration.test_api_schema import try_all_calls

HERE = Path(__file__).parent
DATABASE_TESTS = (
    "test_access.py",
    "test_admin.py",
    "test_alert_delivery.py",
    "test_alerts.py",
    "test_alerts_pages.py",
    "test_audit_trail.py",
    "test_commands.py",
    "test_dashboard_guard.py",
    "test_dashboard_pages.py",
    "test_dashboard_requests.py",
    "test_dashboard_rollups.py",
    "test_directory.py",
    "test_historian.py",
    "test_offline_ends.py",
    "test_own_pages.py",
    "test_policy_switch.py",
    "test_replicas.py",
    "test_services.py",
    "test_tenant_exchange.py",
    "test_wanted_replicas.py",
)
PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin", "/opt/homebrew/opt/postgresql*/bin")
START_TIMEOUT_S = 60


def find_binaries() -> Path | None:
    """The folder of `initdb` and `postgres`, of the newest version where there are several."""
    if on_path := shutil.which("initdb"):
        return Path(on_path).resolve().parent
    found = [folder for place in PLACES for folder in Path("/").glob(place.lstrip("/")) if (folder / "initdb").exists()]
    return max(found, key=lambda folder: [int(digits) for digits in folder.parts if digits.isdigit()], default=None)


def other_user() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: the user to give its processes instead."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """URL of a database on a server of this test's own, reachable by a socket alone."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (on Debian: apt-get install postgresql)")
    user = other_user()
    folder = Path(tempfile.mkdtemp(prefix="pspg-"))
    try:
        if user:
            os.chown(folder, user["user"], user["group"])
        data = folder / "data"
        initdb = [str(binaries / "initdb"), "-D", str(data), "-U", "penstock", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)
        options = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off", "max_connections": 50}
        serve = [str(binaries / "postgres"), "-D", str(data), *(f"--{name}={value}" for name, value in options.items())]
        with (folder / "log").open("wb") as log, subprocess.Popen(serve, stderr=log, cwd=folder, **user) as server:
            try:
                create_database(folder, server)
                yield f"postgres://penstock@/penstock?host={folder}"
            finally:
                server.send_signal(signal.SIGQUIT)
    finally:
        shutil.rmtree(folder)


def create_database(folder: Path, server: "subprocess.Popen[Any]") -> None:
    """Wait until the server answers, and make the database."""
    log = folder / "log"
    for _ in range(START_TIMEOUT_S * 10):
        assert server.poll() is None, log.read_text()
        try:
            with psycopg.connect(host=str(folder), user="penstock", dbname="postgres", autocommit=True) as connection:
                connection.execute("CREATE DATABASE penstock")
                return
        except psycopg.OperationalError:
            try:
                server.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    pytest.fail(f"PostgreSQL did not answer within {START_TIMEOUT_S} s: {log.read_text()}")


@pytest.mark.postgres
def test_the_database_tests_pass_on_postgresql(postgres_url: str, redis_url: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "DATABASE_URL": postgres_url,
        "TEST_REDIS_URL": redis_url,
        "PENSTOCK_VAR": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *DATABASE_TESTS]
    result = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-16000:] + result.stderr[-2000:]


@pytest.mark.postgres
def test_no_call_is_a_server_error_on_postgresql(postgres_url: str) -> None:
    with running_stack({"alpha": {}}, DATABASE_URL=postgres_url) as stack:
        statuses = try_all_calls(stack, examples=3)
    assert statuses["session"][200] > 10, statuses


MIGRATE = "import django; django.setup(); from controlplane.preflight import migrate; migrate()"


@pytest.mark.postgres
def test_machines_that_start_at_the_same_time_prepare_the_database_once(postgres_url: str, tmp_path: Path) -> None:
    machines = []
    for number in range(3):
        environment = os.environ | {
            "DATABASE_URL": postgres_url,
            "PENSTOCK_VAR": str(tmp_path / str(number)),
            "DJANGO_SETTINGS_MODULE": "controlplane.settings",
        }
        command = [sys.executable, "-c", MIGRATE]
        machines.append(subprocess.Popen(command, env=environment, cwd=HERE.parent.parent))
    assert [machine.wait(120) for machine in machines] == [0, 0, 0]


UPGRADE = """
import django
django.setup()
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from dashboard.models import GuardedSwitch
from scheduling.models import OperatorAction
BEFORE = [("dashboard", "0005_default_alert_rules"), ("scheduling", "0005_time_per_output_token")]
executor = MigrationExecutor(connection)
executor.migrate(BEFORE)
old = executor.loader.project_state(BEFORE).apps
now = "2026-03-01T12:00:00Z"
old.get_model("scheduling", "PolicyRevision").objects.create(model="demo", revision=3, name="fair")
old.get_model("scheduling", "OperatorAction").objects.create(actor_name="olga", action="policy.switch", target="demo")
old.get_model("dashboard", "GuardedSwitch").objects.create(
    model="demo", revision=3, metric="failed", threshold=5, watch_s=600, started_at=now, ends_at=now
)
call_command("migrate", verbosity=0)
assert GuardedSwitch.objects.get().row.revision == 3
assert OperatorAction.objects.get().token == ""
"""


@pytest.mark.postgres
def test_a_database_in_use_is_brought_up_to_date_with_its_rows(postgres_url: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "DATABASE_URL": postgres_url,
        "PENSTOCK_VAR": str(tmp_path),
        "DJANGO_SETTINGS_MODULE": "controlplane.settings",
    }
    subprocess.run([sys.executable, "-c", UPGRADE], env=environment, cwd=HERE.parent.parent, check=True, timeout=120)
