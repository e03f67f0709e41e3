"""What tests of alerts share: a clock that a test moves, rules and queues to fire, and a receiver of webhooks."""

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dashboard.alerts.models import Alert, AlertRule
from dashboard.alerts.watch import watch_alerts
from tests.fleet_data import FleetWriter

PATIENCE_S = 60.0


class SteppedClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def make_rule(**values: Any) -> AlertRule:
    known: dict[str, Any] = {"name": "Long queue", "kind": "queue", "threshold": 3, "hold_s": 20, "clear_s": 10}
    return AlertRule.objects.create(**(known | values))


def watch(clock: SteppedClock) -> int:
    return watch_alerts(clock=clock)


def fill(fleet: FleetWriter, num: int = 5) -> None:
    for i in range(num):
        fleet.enqueue(f"tenant-{i}")


class Receiver:
    """A real HTTP server that keeps what it is posted, and answers with the statuses it is given, 200 at last."""

    def __init__(self) -> None:
        receiver = self
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.gate.wait(PATIENCE_S)
                receiver.posts.append(({k.lower(): v for k, v in self.headers.items()} | {"path": self.path}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("Location", "http://127.0.0.1/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook?team=7"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.thread.join(PATIENCE_S)
        self.server.server_close()

    @property
    def notices(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.posts]


def fire(fleet: FleetWriter, clock: SteppedClock) -> Alert:
    """An alert that fires at once."""
    make_rule(hold_s=0)
    fill(fleet)
    assert watch(clock) == 1
    return Alert.objects.get()
