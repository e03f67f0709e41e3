"""The whole system, started as a user starts it, in a folder and on a port of its own."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import httpx
import openai
import psutil
import redis

from benchmarks.stack import free_port
from scheduling.fleet import FleetQueue, QueueSnapshot
from scheduling.keys import Keys
from scheduling.store import execute
from tests.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).resolve().parents[2]
MODEL = "penstock-demo"
QUICK_S = 10.0
"""In so long everything stops, at the most, on a machine that has time."""


class WholeSystem:
    """`manage.py up` and what belongs to it."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
        for name in ("DATABASE_URL", "REDIS_URL", "DJANGO_SETTINGS_MODULE"):
            kept.pop(name, None)
        self.environment = {**kept, "PENSTOCK_VAR": str(folder), "PENSTOCK_PORT": str(self.port), **settings}
        self.supervisor: psutil.Popen | None = None
        self._reader: threading.Thread | None = None
        self._clients: dict[str, openai.OpenAI] = {}
        self._start_s = 0.0

    def start(self) -> None:
        """Start and wait until it says that it runs."""
        self.lines = []
        started = time.monotonic()
        self.supervisor = psutil.Popen(
            [sys.executable, "manage.py", "up"],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self.supervisor.stdout,), daemon=True)
        self._reader.start()
        wait_until(self._runs, self.log)
        self._start_s = time.monotonic() - started

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            self.lines.extend(pipe)

    def _runs(self) -> bool:
        assert self.supervisor is not None
        assert self.supervisor.poll() is None, self.log()
        return any("Penstock is running." in line for line in self.lines)

    def log(self) -> str:
        """What was printed."""
        return "".join(self.lines)

    def refuse(self) -> str:
        """Start where that cannot work: the sentence on which it ends."""
        done = subprocess.run(
            [sys.executable, "manage.py", "up"],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    def stop(self, signum: signal.Signals = signal.SIGINT) -> None:
        """Send a signal and wait for the end, which takes no longer than the start or QUICK_S took."""
        assert self.supervisor is not None
        if self.supervisor.poll() is not None:
            return
        while self._clients:
            self._clients.popitem()[1].close()
        started = time.monotonic()
        self.supervisor.send_signal(signum)
        self.supervisor.wait(PATIENCE_S)
        assert self._reader is not None
        self._reader.join()
        # What a machine that is busy needs for a start says how busy it is.
        assert time.monotonic() - started < max(QUICK_S, self._start_s)

    def processes(self) -> list[psutil.Process]:
        """Every process below the supervisor."""
        assert self.supervisor is not None
        return list(self.supervisor.children(recursive=True))

    def process(self, pattern: str) -> psutil.Process:
        """The first process whose command line matches."""
        for process in self.processes():
            try:
                if re.search(pattern, " ".join(process.cmdline())):
                    return process
            except psutil.NoSuchProcess:
                continue
        raise AssertionError(f"no process matches {pattern}")

    def keys(self) -> dict[str, str]:
        """Tenant -> API key."""
        lines = (self.folder / "demo.env").read_text().splitlines()
        return {name[4:].lower(): key for name, _, key in (line.partition("=") for line in lines) if name[:4] == "KEY_"}

    def password(self) -> str:
        """The operator's."""
        found = re.search(r"^OPERATOR_PASSWORD=(.+)$", (self.folder / "demo.env").read_text(), re.MULTILINE)
        assert found
        return found[1]

    def client(self, tenant: str = "checkout") -> openai.OpenAI:
        """The official client, as a tenant. It must not hide a failure by trying again."""
        if tenant not in self._clients:
            self._clients[tenant] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=self.keys()[tenant], max_retries=0, timeout=PATIENCE_S
            )
        return self._clients[tenant]

    def aclient(self, tenant: str = "checkout") -> openai.AsyncOpenAI:
        """The same for asyncio."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=self.keys()[tenant], max_retries=0, timeout=PATIENCE_S
        )

    def operator(self) -> httpx.Client:
        """A browser's session of the operator, with what Django's forms ask for."""
        client = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        client.get("/login/").raise_for_status()
        form = {"username": "operator", "password": self.password(), "csrfmiddlewaretoken": client.cookies["csrftoken"]}
        answer = client.post("/login/", data=form, headers={"Referer": f"{self.url}/login/"})
        assert answer.status_code == 302, answer.text
        client.headers.update({"X-CSRFToken": client.cookies["csrftoken"], "Referer": f"{self.url}/"})
        return client

    def queue(self) -> QueueSnapshot:
        """The live queue, from Redis."""
        with redis.Redis.from_url(f"unix://{self.folder}/run/redis.sock") as client:
            return execute(client, FleetQueue(Keys(), MODEL).snapshot())

    def rows(self, query: str) -> list[tuple[object, ...]]:
        """Rows of the database."""
        connection = sqlite3.connect(self.folder / "penstock.sqlite3", timeout=20)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    def num_records(self, user: str) -> int:
        """Requests in the history that named this `user`."""
        return len(self.rows(f"SELECT id FROM inference_requestrecord WHERE user = '{user}'"))
