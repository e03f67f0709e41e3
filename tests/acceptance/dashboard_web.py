"""A web process with accounts and a speaking engine, and a browser in front of it: what tests of pages share."""

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import redis
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from benchmarks.stack import free_port
from scheduling.keys import Keys
from scheduling.store import execute
from tests.fleet_data import FleetWriter, slots
from tests.patience import PATIENCE_S, wait_until

Visit = Callable[..., Page]
expect.set_options(timeout=1000 * PATIENCE_S)
ROOT = Path(__file__).resolve().parents[2]
PASSWORD = "a-long-password-1"
PREPARE = f"""
import django
django.setup()
from datetime import UTC, datetime, timedelta
from django.contrib.auth.models import Group, User
from django.core.management import call_command
from controlplane.models import Batch, BatchLine
from dashboard.rollups import roll_up
from inference.models import BatchRecord, RequestRecord
from scheduling.models import Quota, ServiceLevel, Tenant
from tests.history_data import TENANTS, make_batches, make_requests
call_command("migrate", verbosity=0)
for name, group in (("ada", "administrator"), ("olga", "operator"), ("victor", "viewer"), ("nora", "")):
    user = User.objects.create_user(name, password="{PASSWORD}")
    if group:
        user.groups.add(Group.objects.get(name=group))
now = datetime.now(UTC)
for place, name in enumerate(TENANTS):
    tenant = Tenant.objects.create(name=name, weight=4 - place)
    Quota.objects.create(tenant=tenant, rpm=600, tpm=60_000, tpd=2_000_000, concurrency=32)
    ServiceLevel.objects.create(tenant=tenant, priority=place, ttft_ms=2000, e2e_ms=6000)
RequestRecord.objects.bulk_create(make_requests(2000, end=now, seconds=5400))
BatchRecord.objects.bulk_create(make_batches(4000, end=now))
batch = Batch.objects.create(
    id="batch_1", tenant="nightly", endpoint="/v1/completions", input_file_id="file-1", status="in_progress",
    num_total=4, expires_at=now + timedelta(days=1),
)
for number, state in enumerate(("completed", "failed", "submitted", "pending")):
    BatchLine.objects.create(batch=batch, number=number, custom_id=str(number), body="{{}}", state=state)
roll_up(60)
"""


class WebProcess:
    """uvicorn with the product's own application."""

    def __init__(self, folder: Path, redis_url: str, keys: Keys) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "controlplane.settings",
            "PENSTOCK_VAR": str(folder),
            "PENSTOCK_KEY_PREFIX": keys.prefix,
            "PENSTOCK_QUEUE_LIMIT": "100",
            "REDIS_URL": redis_url,
            "PYTHONWARNINGS": "default",
        }
        self._environment.pop("DATABASE_URL", None)
        self._log = folder / "web.log"
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Make the database and its users."""
        subprocess.run([sys.executable, "-c", PREPARE], env=self._environment, cwd=ROOT, check=True, timeout=PATIENCE_S)

    def manage(self, *words: str) -> None:
        """Run a management command on this process's data, as another process would."""
        command = [sys.executable, "manage.py", *words]
        subprocess.run(command, env=self._environment, cwd=ROOT, check=True, timeout=PATIENCE_S)

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [sys.executable, "-m", "uvicorn", "controlplane.asgi:application", "--port", str(self.port)]
        with self._log.open("ab") as log:
            options = ["--loop", "asyncio", "--timeout-graceful-shutdown", "1"]
            self._process = subprocess.Popen(
                [*command, *options], env=self._environment, cwd=ROOT, stdout=log, stderr=log
            )
        wait_until(self._answers, self._log.read_text, period_s=0.05)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/login/", timeout=PATIENCE_S):
                return True
        except (URLError, ConnectionError):
            return False

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        assert self._process is not None
        self._process.send_signal(sig)
        self._process.wait(PATIENCE_S)


class EngineVoice:
    """Publishes a replica's status four times a second, under the policy in force, as an engine process does."""

    def __init__(self, fleet: FleetWriter) -> None:
        self._fleet = fleet
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(0.25):
            active = execute(self._fleet.client, self._fleet.queue.active_policy())
            running = slots(5, ["chat", "research"])
            status = self._fleet.status(slots=running, revision=active.revision, policy=active.name, waits_s=[0.2] * 9)
            self._fleet.publish(status)

    def __enter__(self) -> "EngineVoice":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        debian = Path("/usr/bin/chromium")
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=debian if debian.exists() else None, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def page_keys() -> Keys:
    return Keys(prefix=f"page{os.getpid()}")


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory, redis_url: str, page_keys: Keys) -> Iterator[WebProcess]:
    process = WebProcess(tmp_path_factory.mktemp("web"), redis_url, page_keys)
    process.prepare()
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def fleet(redis_url: str, page_keys: Keys) -> Iterator[FleetWriter]:
    with redis.Redis.from_url(redis_url) as client:
        writer = FleetWriter(client, page_keys)
        writer.deploy()
        with EngineVoice(writer):
            yield writer


@pytest.fixture
def visitor(chromium: Browser, web: WebProcess, fleet: FleetWriter) -> Iterator[BrowserContext]:
    made = chromium.new_context(base_url=web.url, viewport={"width": 1400, "height": 1000})
    made.set_default_timeout(1000 * PATIENCE_S)
    yield made
    made.close()


@pytest.fixture(scope="session")
def sessions() -> dict[str, list[Any]]:
    """Cookies of who signed in before: one login for each name."""
    return {}


def sign_in(page: Page, name: str = "olga", password: str = PASSWORD) -> None:
    page.goto("/login/")
    page.get_by_label("User name").fill(name)
    page.get_by_label("Password").fill(password)
    page.keyboard.press("Enter")


@pytest.fixture
def visit(visitor: BrowserContext, sessions: dict[str, list[Any]]) -> Visit:
    """Opens a page as a user, the live page by default, and waits until it is live."""

    def open_live(name: str = "olga", path: str = "/") -> Page:
        page = visitor.new_page()
        if name in sessions:
            visitor.add_cookies(sessions[name])
        else:
            sign_in(page, name)
            expect(page.locator("#connection")).to_have_text("Live")
            sessions[name] = visitor.cookies()
        page.goto(path)
        expect(page.locator("#connection")).to_have_text("Live")
        if path == "/":
            expect(page.locator('[data-figure="depth"]')).to_have_text(re.compile(r"^\d"))
        return page

    return open_live
