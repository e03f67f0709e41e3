"""The engine when Redis or time is lost: the batch waits, no token is lost, and a lost lease is given up."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from inference.messages import RequestEvent
from scheduling.keys import Keys
from scheduling.store import execute
from tests.conftest import _server_binary
from tests.integration.engines import Engines
from tests.integration.fleet import FleetClient
from tests.patience import PATIENCE_S, wait_until


class Server:
    """A Redis with an append-only file that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.url = f"unix://{folder / 'redis.sock'}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = [
            "--port",
            "0",
            "--unixsocket",
            str(self._folder / "redis.sock"),
            "--save",
            "",
            "--dir",
            str(self._folder),
        ]
        durable = ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen([_server_binary(), *options, *durable], stdout=subprocess.DEVNULL)

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Answer nothing for the length of the block."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        yield
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="psr-") as folder:
        server = Server(Path(folder))
        server.start()
        yield server
        server.kill()


@pytest.fixture
def own_engines(server: Server, checkpoint: Path, keys: Keys) -> Iterator[Engines]:
    """Like `engines`, with a Redis that the test may kill."""
    with Engines(checkpoint, server.url, keys) as engines:
        yield engines


@pytest.fixture
def own_fleet(server: Server, keys: Keys) -> Iterator[FleetClient]:
    """Like `fleet`, for `own_engines`; calls wait for the Redis to come back."""
    with redis.Redis.from_url(server.url, retry=Retry(ConstantBackoff(0.05), 400)) as client:
        yield FleetClient(client, keys, Engines.model)


def test_a_batch_waits_for_a_redis_that_was_killed_and_loses_nothing(
    server: Server, own_engines: Engines, own_fleet: FleetClient
) -> None:
    engine = own_engines.start()
    for i in range(12):
        own_fleet.submit(f"r{i}", [5 + i, 6], 150)
    own_fleet.until(lambda: len(own_fleet.answers["r0"].token_ids) > 20)
    for _ in range(2):
        server.kill()
        assert engine.send("policy", {"name": "fifo", "revision": 0}, PATIENCE_S).ok
        server.start()
        num_tokens = own_fleet.num_tokens()
        own_fleet.until(lambda n=num_tokens: own_fleet.num_tokens() > n)  # type: ignore[misc]
    own_fleet.until_finished()
    assert all(len(answer.token_ids) == 150 for answer in own_fleet.answers.values())
    assert {attempt for answer in own_fleet.answers.values() for attempt in answer.attempts} == {1}
    own_fleet.until(lambda: {event.id for event in own_fleet.events(RequestEvent)} == set(own_fleet.answers))


def test_a_drained_engine_is_stopped_only_once_what_it_gave_back_is_in_the_queue(
    server: Server, own_engines: Engines, own_fleet: FleetClient
) -> None:
    engine = own_engines.start()
    for i in range(6):
        own_fleet.submit(f"r{i}", [5 + i, 6], 240)
    own_fleet.until(lambda: all(answer.token_ids for answer in own_fleet.answers.values()))

    def state() -> str:
        return engine.send("policy", {"name": "fifo", "revision": 0}, PATIENCE_S).state

    with server.held_up():
        assert engine.send("drain", {"drain_s": 0}, PATIENCE_S).state == "draining"
        assert {state() for _ in range(5)} == {"draining"}
    wait_until(lambda: state() == "stopped")
    snapshot = execute(own_fleet.client, own_fleet.queue.snapshot())
    assert (snapshot.running, snapshot.depth) == (0, 6)


def test_an_engine_that_was_held_up_gives_up_what_others_took_over(
    store: redis.Redis, engines: Engines, fleet: FleetClient
) -> None:
    held_up = engines.start("gpu-0")
    for i in range(8):
        fleet.submit(f"r{i}", [5 + i, 6], 240)
    fleet.until(lambda: all(answer.token_ids for answer in fleet.answers.values()))
    os.kill(held_up.pid, signal.SIGSTOP)
    other = engines.start("gpu-1")
    assert [num for _, num in execute(store, fleet.queue.expire(now=time.time() + 3600))] == [8]
    fleet.until(lambda: any(2 in answer.attempts for answer in fleet.answers.values()))
    os.kill(held_up.pid, signal.SIGCONT)
    fleet.until_finished()
    assert all(len(answer.token_ids) == 240 for answer in fleet.answers.values())
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and not s.slots)
    other.kill()
    other.wait(PATIENCE_S)
    fleet.submit("afterwards", [5, 6], 10)
    fleet.until_finished()
    assert fleet.status("gpu-0") is not None


def test_an_engine_claims_again_what_an_unnoticed_end_of_its_lease_took_from_it(
    store: redis.Redis, engines: Engines, fleet: FleetClient
) -> None:
    engines.start()
    for i in range(3):
        fleet.submit(f"r{i}", [5 + i, 6], 240)
    fleet.until(lambda: all(answer.token_ids for answer in fleet.answers.values()))
    assert [num for _, num in execute(store, fleet.queue.expire(now=time.time() + 3600))] == [3]
    fleet.until_finished()
    assert all(len(answer.token_ids) == 240 for answer in fleet.answers.values())
    assert {max(answer.attempts) for answer in fleet.answers.values()} == {2}
    assert execute(store, fleet.queue.snapshot()).running == 0
