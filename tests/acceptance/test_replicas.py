"""Replicas are added and removed under traffic, and a supervisor dies: what is wanted comes about, nothing is lost."""

import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis
from playwright.sync_api import Browser, BrowserContext, Page, expect

from inference.messages import ReplicaStatus
from scheduling.keys import Keys
from tests.acceptance.whole_system import MODEL, WholeSystem
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.acceptance


class Traffic:
    """Clients that stream one answer after the other until told to end; each must be whole."""

    def __init__(self, system: WholeSystem, num_clients: int = 3, max_tokens: int = 100) -> None:
        self._system = system
        self._max_tokens = max_tokens
        self._end = threading.Event()
        self.num_whole = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_clients)]

    def _run(self) -> None:
        client = self._system.client()
        while not self._end.is_set():
            try:
                done = client.completions.create(
                    model=MODEL, prompt="Rain", max_tokens=self._max_tokens, extra_body={"ignore_eos": True}
                )
            except Exception as error:  # whatever it is, it is a request that was lost
                self.failures.append(repr(error))
                return
            usage = done.usage
            assert usage is not None
            if usage.completion_tokens == self._max_tokens:
                self.num_whole += 1
            else:
                self.failures.append(f"{usage.completion_tokens} tokens")

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)


class Fleet:
    """The fleet's API, as an operator, and what replicas say."""

    def __init__(self, system: WholeSystem) -> None:
        self._http: httpx.Client = system.operator()
        self._store = redis.Redis.from_url(f"unix://{system.folder}/run/redis.sock")
        self._keys = Keys()

    def post(self, path: str, **body: Any) -> None:
        answer = self._http.post(f"/api/v1/fleet/replicas{path}", json={"reason": "a test", **body})
        assert answer.status_code in (200, 201), answer.text

    def status(self, name: str) -> ReplicaStatus | None:
        packed: Any = self._store.get(self._keys.replica(name))
        return None if packed is None else msgspec.msgpack.decode(packed, type=ReplicaStatus)

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        wait_until(condition, lambda: f"{what}\n{self._http.get('/api/v1/fleet').text}", 0.1)

    def close(self) -> None:
        self._http.close()
        self._store.close()


@pytest.fixture
def started(demo_folder: Path, tmp_path: Path) -> Iterator[WholeSystem]:
    """A machine whose settings ask for no replica."""
    shutil.copytree(demo_folder / "models" / "demo", tmp_path / "models" / "demo")
    settings = {"MACHINE": "attic", "GPU_WORKERS": "0", "DEVICE": "cpu", "LEASE_S": "2"}
    system = WholeSystem(tmp_path, **{f"PENSTOCK_{name}": value for name, value in settings.items()})
    system.start()
    yield system
    system.stop()


@pytest.fixture
def visitor(started: WholeSystem, chromium: Browser) -> Iterator[BrowserContext]:
    made = chromium.new_context(base_url=started.url, viewport={"width": 1400, "height": 1000})
    made.set_default_timeout(1000 * PATIENCE_S)
    yield made
    made.close()


def open_fleet(visitor: BrowserContext, system: WholeSystem) -> Page:
    page = visitor.new_page()
    page.goto("/login/?next=/fleet/")
    page.get_by_label("User name").fill("operator")
    page.get_by_label("Password").fill(system.password())
    page.keyboard.press("Enter")
    expect(page.locator("#connection")).to_have_text("Live")
    return page


def test_the_fleet_becomes_what_is_wanted_and_no_request_is_lost_on_the_way(
    started: WholeSystem, visitor: BrowserContext
) -> None:
    fleet = Fleet(started)
    fleet.post("", model=MODEL, machine="attic")
    # The supervisor is killed before it can have done that; the next one does it.
    assert started.supervisor is not None
    started.supervisor.send_signal(signal.SIGKILL)
    started.supervisor.wait(PATIENCE_S)
    fleet.close()
    started.start()
    fleet = Fleet(started)
    page = open_fleet(visitor, started)
    expect(page.locator("#worker-gpu-0 .state")).to_have_text("● ready")
    expect(page.locator("#wanted-rows tr")).to_contain_text("nothing")
    with Traffic(started) as traffic:
        page.get_by_role("button", name="Add a replica…").press("Enter")
        expect(page.get_by_label("Machine and device")).to_contain_text("attic, CPU")
        page.get_by_role("textbox", name=re.compile("^Reason")).fill("the evening")
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator("#wanted-rows tr")).to_contain_text("wanted: 2 replicas, running: 1")
        expect(page.locator("#worker-gpu-1 .differs")).to_contain_text("gpu-1 on attic")
        fleet.until(
            "the second replica takes requests", lambda: (s := fleet.status("gpu-1")) is not None and s.steps > 0
        )
        page.get_by_role("button", name="Remove… gpu-1").press("Enter")
        page.get_by_label(re.compile("^Let what runs finish")).fill("0")
        page.get_by_role("textbox", name=re.compile("^Reason")).fill("the night")
        page.get_by_role("button", name="Remove gpu-1", exact=True).press("Enter")
        expect(page.locator("#worker-gpu-1")).to_have_count(0)
        expect(page.locator("#wanted-rows tr")).to_contain_text("nothing")
        assert not [p for p in started.processes() if "gpu.gpu-1@" in " ".join(p.cmdline())]
        served = traffic.num_whole
        fleet.until("clients are served", lambda: traffic.num_whole > served or bool(traffic.failures))
    assert traffic.failures == []
    fleet.close()
