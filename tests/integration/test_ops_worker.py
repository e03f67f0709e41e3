"""A real ops worker: its periodic tasks run, and go on by themselves after Redis was restarted."""

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from celery import Celery
from redis.backoff import ConstantBackoff
from redis.exceptions import BusyLoadingError, ConnectionError
from redis.retry import Retry

from controlplane.config import Config
from controlplane.probe import probe
from inference.messages import RequestEvent
from scheduling.keys import Keys
from tests.conftest import _server_binary
from tests.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
KEYS = Keys(prefix="opstest")


class Server:
    """A Redis of this test's own, which it may stop and start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/redis.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [_server_binary(), "--port", "0", "--unixsocket", f"{self.folder}/redis.sock", "--save", ""]
        command += ["--dir", str(self.folder), "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        retry = Retry(ConstantBackoff(0.05), 200, supported_errors=(ConnectionError, BusyLoadingError))
        with redis.Redis.from_url(self.url, retry=retry) as client:
            client.ping()

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="pso-") as folder:
        server = Server(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def database(tmp_path: Path, server: Server) -> Iterator[Path]:
    """Data directory of a running ops worker; the worker must end by itself after SIGTERM."""
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"} | {
        "DJANGO_SETTINGS_MODULE": "controlplane.settings",
        "PENSTOCK_VAR": str(tmp_path),
        "PENSTOCK_KEY_PREFIX": KEYS.prefix,
        "REDIS_URL": server.url,
    }
    subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=ROOT, env=environment, check=True)
    command = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "controlplane", "worker", "-n", "ops@here"]
    command += ["-Q", "ops", "-B", "--pool", "threads", "--concurrency", "4", "--without-mingle", "--without-gossip"]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            yield tmp_path / "penstock.sqlite3"
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(PATIENCE_S) == 0
        finally:
            worker.kill()
            worker.wait()


def eventually(condition: Callable[[], Any], log: Path) -> None:
    wait_until(condition, lambda: log.read_text()[-4000:], period_s=0.1)


def add_event(server: Server, request_id: str) -> None:
    event = RequestEvent(
        id=request_id, model="demo", tenant="acme", priority=3, endpoint="completions", state="finished",
        finish_reason="stop", arrival_s=1.0, finished_s=2.0, prompt_tokens=1, completion_tokens=1, max_tokens=1,
    )  # fmt: skip
    with redis.Redis.from_url(server.url) as client:
        client.xadd(KEYS.history, {"m": msgspec.msgpack.encode([event])})


def written(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT request_id FROM inference_requestrecord ORDER BY request_id")
        return [request_id for (request_id,) in rows]


def answers(server: Server) -> list[Any]:
    broker = server.url.replace("unix://", "redis+socket://") + "?virtual_host=0"
    with Celery(broker=broker, set_as_current=False) as app:
        app.conf.broker_transport_options = {"global_keyprefix": f"{KEYS.prefix}:celery:"}
        # A connection of its own: one from the pool would be the one that the restart broke.
        with app.connection_for_write() as connection:
            return list(app.control.ping(destination=["ops@here"], timeout=2.0, connection=connection) or [])


def counted_alerts(server: Server) -> list[Any]:
    """What the evaluation of alert rules leaves for /metrics."""
    with redis.Redis.from_url(server.url) as client:
        left: Any = client.get(KEYS.alerts)
    return msgspec.json.decode(left) if left else []


def test_history_is_written_and_control_answers_also_after_redis_restarted(server: Server, database: Path) -> None:
    log = database.with_name("log")
    add_event(server, "r1")
    eventually(lambda: written(database) == ["r1"], log)
    eventually(lambda: answers(server) == [{"ops@here": {"ok": "pong"}}], log)
    server.stop()
    eventually(lambda: "Periodic tasks wait, since Redis does not answer" in log.read_text(), log)
    server.start()
    add_event(server, "r2")
    eventually(lambda: written(database) == ["r1", "r2"], log)
    eventually(lambda: answers(server) == [{"ops@here": {"ok": "pong"}}], log)
    eventually(lambda: counted_alerts(server), log)
    eventually(lambda: probe(Config.model_construct(redis_url=server.url, key_prefix=KEYS.prefix), "ops") == "", log)
    assert "Message Error" not in log.read_text()  # what beat says of every task, with two tracebacks
