"""How long from an event in the engine to its pixel, with 20 dashboards open under load; and what the feed costs.

    python -m benchmarks.pixel --checkpoint var/models/demo

runs a web process, a real engine process and clients that keep it busy. The event is that the engine takes a request
up, by its own clock (`claimed_s` of its history). One dashboard is a page in Chromium: a MutationObserver notes a
request's first slot, and its time is taken two animation frames later, when the frame with it has been painted. The
others are sockets, which take messages as pages do; their time is that of the message. All on one machine.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import redis
import websockets
from playwright.async_api import async_playwright

from benchmarks.stack import MODEL, PREFIX, ROOT, Stack, running_stack
from inference.messages import BatchEvent, DeploymentSpec, ReplicaStatus, RequestEvent
from inference.worker.meters import Meters, Second
from inference.worker.process import EngineProcess
from inference.worker.reporter import PERIOD_S, Reporter
from inference.worker.spec import EngineSpec
from inference.worker.status import StatusBoard
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.keys import Keys

NUM_DASHBOARDS = 20
NUM_PAGES = 1
LIMIT_MS = 300
SLOTS = 16
DEBIAN = Path("/usr/bin/chromium")
HAS_DEBIAN = DEBIAN.exists()
SIGN_IN = """
import django
django.setup()
from importlib import import_module
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.auth.models import User
user = User.objects.create_superuser("watcher")
session = import_module(settings.SESSION_ENGINE).SessionStore()
session[SESSION_KEY] = str(user.pk)
session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
session[HASH_SESSION_KEY] = user.get_session_auth_hash()
session.create()
print(settings.SESSION_COOKIE_NAME, session.session_key)
"""
WATCH = """
window.seen = {};
document.addEventListener("DOMContentLoaded", () => new MutationObserver((changes) => {
  for (const { target } of changes) {
    const id = (target.title || "").split(":")[0];
    if (!target.classList.contains("slot") || !id || id in window.seen) continue;
    window.seen[id] = 0;
    requestAnimationFrame(() => requestAnimationFrame(() => (window.seen[id] = Date.now() / 1000)));
  }
}).observe(document, { subtree: true, attributes: true, attributeFilter: ["title"] }));
"""
Seen = dict[str, float]


def main() -> None:
    """Measure both, print, and with `--json FILE` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "var" / "models" / "demo")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.checkpoint / "model.safetensors").exists():
        sys.exit(f"There is no checkpoint in {options.checkpoint}; `make up` trains the demo's once.")
    figures: dict[str, Any] = {}
    with running_stack(checkpoint=options.checkpoint.resolve()) as stack:
        figures["feed_cost"] = [feed_cost(stack, num_slots) for num_slots in (16, 64, 256)]
        with running_engine(stack), busy_clients(stack, options.clients):
            figures["event_to_pixel"] = asyncio.run(watch(stack, options.seconds))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


@contextmanager
def running_engine(stack: Stack) -> Iterator[EngineProcess]:
    """A real engine process, once it serves."""
    deployment = DeploymentSpec(name=MODEL, path=str(stack.checkpoint), max_batch_size=SLOTS)
    spec = EngineSpec(
        deployment=deployment, replica="gpu-0", redis_url=stack.redis.url, key_prefix=PREFIX, device="cpu", lease_s=5,
        drain_s=1,
    )  # fmt: skip
    with redis.Redis.from_url(stack.redis.url) as client:  # as the ops worker does, which does not run here
        client.hset(Keys(prefix=PREFIX).deployments, MODEL, msgspec.json.encode(deployment))
    process = EngineProcess([sys.executable, "-m", "inference.worker"], spec)
    try:
        assert process.ready.wait(300), "the engine does not become ready"
        yield process
    finally:
        process.kill()
        process.wait(10)


@contextmanager
def busy_clients(stack: Stack, count: int) -> Iterator[None]:
    """Clients that ask again as soon as they are answered."""
    ending = threading.Event()
    (key,) = stack.api_keys.values()
    body = {"model": MODEL, "prompt": "Once upon a time there was a gate", "max_tokens": 96, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def ask() -> None:
        while not ending.is_set():
            request = urllib.request.Request(f"{stack.url}/v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join(120)


def sign_in(stack: Stack) -> tuple[str, str]:
    """Name and value of the cookie of somebody who may see all pages."""
    command = [sys.executable, "-c", SIGN_IN]
    answer = subprocess.run(command, cwd=ROOT, env=stack.environment, check=True, capture_output=True, text=True)
    cookie, session = answer.stdout.split()
    return cookie, session


async def watch(stack: Stack, seconds: float) -> dict[str, Any]:
    """Open the dashboards, watch for so long, and compare what they saw with what the engine says."""
    cookie, session = await asyncio.to_thread(sign_in, stack)
    by_sockets: list[Seen] = [{} for _ in range(NUM_DASHBOARDS - NUM_PAGES)]
    told: Seen = {}
    sockets = [asyncio.create_task(follow(stack, f"{cookie}={session}", seen, told)) for seen in by_sockets]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=DEBIAN if HAS_DEBIAN else None,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-renderer-backgrounding"],
        )
        pages = []
        for _ in range(NUM_PAGES):  # each in a window of its own: a page behind another draws nothing
            context = await browser.new_context(viewport={"width": 1400, "height": 1000})
            await context.add_cookies([{"name": cookie, "value": session, "url": stack.url}])
            await context.add_init_script(WATCH)
            page = await context.new_page()
            await page.goto(stack.url)
            await page.locator(".slot:not(.free)").first.wait_for()
            pages.append(page)
        began_s = time.time()
        await asyncio.sleep(seconds)
        ended_s = time.time()
        by_pages: list[Seen] = [await page.evaluate("window.seen") for page in pages]
        await browser.close()
    for task in sockets:
        task.cancel()
    await asyncio.gather(*sockets, return_exceptions=True)
    started = engine_times(stack, began_s, ended_s)
    return {
        "status": report("the worker's status", started, [told]),
        "sockets": report("message", started, by_sockets),
        "pages": report("pixel", started, by_pages),
    }


async def follow(stack: Stack, cookie: str, seen: Seen, told: Seen) -> None:
    """A dashboard without a screen: notes when each request is first named, and of when that status is."""
    address = stack.url.replace("http", "ws", 1) + "/live/"
    headers = {"Cookie": cookie}
    async with websockets.connect(address, additional_headers=headers, origin=stack.url, max_size=None) as socket:  # type: ignore[arg-type]
        async for message in socket:
            now, parts = time.time(), json.loads(message)
            for replica in (parts.get("state") or parts.get("patch") or {}).get("replicas", {}).values():
                for slot in (replica or {}).get("slots") or []:
                    if slot[0] not in seen:
                        seen[slot[0]] = now
                        told[slot[0]] = (replica or {}).get("heard_s", now)


def engine_times(stack: Stack, began_s: float, ended_s: float) -> Seen:
    """When each request was taken up within this time, by the engine's own word."""
    decode = msgspec.msgpack.Decoder(list[RequestEvent | BatchEvent]).decode
    with redis.Redis.from_url(stack.redis.url) as client:
        entries: Any = client.xrange(Keys(prefix=PREFIX).history)
    events = [event for _, fields in entries for event in decode(fields[b"m"]) if isinstance(event, RequestEvent)]
    times = {event.id: event.claimed_s for event in events if event.claimed_s}
    return {name: time_s for name, time_s in times.items() if began_s <= time_s <= ended_s - 1}


def report(what: str, started: Seen, seen_by: Sequence[Seen]) -> dict[str, float]:
    """Percentiles over all dashboards of one kind, in ms."""
    delays = sorted(
        1000 * (seen[name] - time_s) for seen in seen_by for name, time_s in started.items() if seen.get(name)
    )
    missed = len(started) * len(seen_by) - len(delays)
    figures = {
        "events": len(started),
        "dashboards": len(seen_by),
        "missed": missed,
        "p50_ms": round(statistics.median(delays), 1),
        "p99_ms": round(delays[int(0.99 * len(delays))], 1),
        "max_ms": round(delays[-1], 1),
    }
    sign = "" if figures["p99_ms"] < LIMIT_MS else f", over {LIMIT_MS} ms"
    print(
        f"event to {what}, {len(seen_by)} dashboards of {NUM_DASHBOARDS}, {len(started)} events: "
        f"p50 {figures['p50_ms']} ms, p99 {figures['p99_ms']} ms{sign}, longest {figures['max_ms']} ms; "
        f"{missed} not shown"
    )
    return figures


def feed_cost(stack: Stack, num_slots: int, rounds: int = 300) -> dict[str, float]:
    """Processor time that statuses take of a worker, as a share of its time, which while it is busy is its steps'."""
    with redis.Redis.from_url(stack.redis.url) as client:
        allocator = BlockAllocator(4096, 16)
        planner = StepPlanner("continuous", num_slots, 2048, allocator, 4096, time.monotonic)
        meters = Meters(second=Second(started_s=time.time()))
        for _ in range(512):
            meters.count_step(batch_size=num_slots, prompt_tokens=0, output_tokens=num_slots, seconds=0.01)
        first = ReplicaStatus(
            replica="cost", model="cost", host="here", pid=1, state="ready", time_s=time.time(), started_s=time.time()
        )
        parts: Any = SimpleNamespace(
            state="ready", policy="fair", revision=3, name="fixed", params={"initial": 16.0}, changes=[], cost=None
        )
        board = StatusBoard(first, "a model", planner=planner, meters=meters, gate=parts, intake=parts, sizer=parts)
        reporter = Reporter(client, Keys(prefix="cost"), first, lambda: None)
        active: Any = [_Slotted(number) for number in range(num_slots)]
        began = time.process_time()
        for _ in range(rounds):
            reporter.publish(board._status(active, time.time()))
            reporter.send()
        cost_s = (time.process_time() - began) / rounds
    share = cost_s / PERIOD_S
    print(
        f"feed, {num_slots} slots: {1000 * cost_s:.2f} ms a status, {1 / PERIOD_S:.0f} a second: {share:.2%} of a step"
    )
    return {"slots": num_slots, "status_ms": round(1000 * cost_s, 3), "share": round(share, 5)}


class _Slotted:
    """A running request, for the cost of telling of it."""

    def __init__(self, number: int) -> None:
        from inference.messages import InferenceRequest
        from inference.tokenization import TextStream
        from inference.worker.active import ActiveRequest
        from scheduling.core.answers import ClaimedRequest
        from scheduling.core.sequence import SamplingParams

        name = f"chatcmpl-{number:032x}"
        request = InferenceRequest(
            id=name, model="cost", tenant="checkout", priority=3, arrival_s=time.time(), prompt_token_ids=[1] * 64,
            max_tokens=256, sampling=SamplingParams(),
        )  # fmt: skip
        stream: TextStream = SimpleNamespace(push=lambda token: "")  # type: ignore[assignment]
        self._active = ActiveRequest(request, ClaimedRequest(name, b"", 1, []), stream, owner="o", now_s=time.time())
        self._active.mark("started", time.time())
        self._active.first_token_s = time.time()

    def slot(self) -> Any:
        return self._active.slot()


if __name__ == "__main__":
    main()
