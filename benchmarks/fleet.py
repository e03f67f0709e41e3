"""The queue in Redis under four client processes: requests admitted and enqueued, then claimed, a second.

    python -m benchmarks.fleet [--requests 40000] [--rounds 3] [--clients 4] [--json FILE]

An admitted request is charged to its tenant's limits (`acquire`: requests and tokens a minute, concurrency) and then
enqueued, as a web process does it: one connection a process, the commands of concurrent requests sharing round trips
(64 of a kind in each). Claims go as engine processes do them, one command a round trip, of 32 requests or of one. The
server has its append-only file on, as it is run. It computes in one thread, so beside each rate stands what it took
itself (INFO commandstats): 1e6 over that is the rate at which it is full.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import redis

from benchmarks.entries import draw_entries
from benchmarks.modes import processor_name
from benchmarks.stack import RedisServer
from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import Command, connect, execute, execute_many, load_script

LEAST = 10_000
WINDOW = 64
"""Concurrent requests of a web process: so many commands share a round trip."""
BODY = b"x" * 600
MODEL = "m"
POLICY = "fair"
SCRIPTS = ("acquire", "enqueue", "claim")


class Rate(NamedTuple):
    """Requests a second by the clock, and the server's microseconds a request."""

    name: str
    per_s: float
    server_us: float
    """Of the scripts."""
    server_busy: float
    """Part of the time in which the server's process computed."""


def admit(client: redis.Redis, keys: Keys, entries: Sequence[QueueEntry]) -> None:
    """Charge and enqueue, `WINDOW` requests at a time."""
    limits, queue, policy = TenantLimits(keys), FleetQueue(keys, MODEL), build_policy(POLICY)
    for start in range(0, len(entries), WINDOW):
        window = entries[start : start + WINDOW]
        charges: list[Command[Any]] = [
            limits.acquire(e.tenant, e.id, rpm=10**9, tpm=10**12, concurrency=10**9, tokens=e.cost_tokens)
            for e in window
        ]
        assert all(admission.ok for admission in execute_many(client, charges))
        answers = execute_many(
            client,
            [
                queue.enqueue(
                    e,
                    policy.place(e),
                    revision=1,
                    body=BODY,
                    depth_limit=10**9,
                    tokens_limit=10**12,
                    reply_to=f"web-{os.getpid()}",
                    shed=True,
                )
                for e in window
            ],
        )
        assert all(answer.status == "queued" for answer in answers)


def claim(client: redis.Redis, keys: Keys, num: int, at_once: int) -> None:
    """Claim `num` requests, `at_once` in each round trip."""
    queue, owner, left = FleetQueue(keys, MODEL), f"gpu-{os.getpid()}", num
    for number in range(num):
        command = queue.claim(
            owner, max_requests=min(at_once, left), max_tokens=2**31, lease_s=60, number=at_once * 10**8 + number
        )
        left -= len(execute(client, command).requests)
        if not left:
            return
    raise RuntimeError(f"{left} requests were not there to be claimed.")


def _client(url: str, prefix: str, index: int, num: int, start: Barrier, stages: Sequence[Barrier]) -> None:
    client, keys = connect(url), Keys(prefix)
    entries = draw_entries(Random(index), f"{prefix}-{index}", num)
    batched = num - num // 4
    work: list[Callable[[], None]] = [
        lambda: admit(client, keys, entries),
        lambda: claim(client, keys, batched, 32),
        lambda: claim(client, keys, num - batched, 1),
    ]
    start.wait()
    for stage, barrier in zip(work, stages, strict=True):
        stage()
        barrier.wait()
        barrier.wait()


def measure(url: str, pid: int, prefix: str, num_requests: int, num_clients: int) -> list[Rate]:
    """One round: admit them all, claim three quarters 32 at a time, the rest one at a time."""
    client, each = connect(url), num_requests // num_clients
    execute(client, FleetQueue(Keys(prefix), MODEL).init_policy(POLICY, {}, 1))
    for name in SCRIPTS:
        client.script_load(load_script(name).source)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(num_clients + 1)
    stages = [context.Barrier(num_clients + 1) for _ in range(3)]
    processes = [
        context.Process(target=_client, args=(url, prefix, index, each, start, stages)) for index in range(num_clients)
    ]
    for process in processes:
        process.start()
    totals = each * num_clients
    singles = (each - (each - each // 4)) * num_clients
    rates = []
    client.config_resetstat()
    started, cpu = _begin(start, pid)
    for name, num, barrier in zip(
        ("admitted and enqueued", "claimed, 32 at a time", "claimed, one at a time"),
        (totals, totals - singles, singles),
        stages,
        strict=True,
    ):
        barrier.wait()
        wall_s = time.perf_counter() - started
        busy_s = _cpu_s(pid) - cpu
        rates.append(Rate(name, num / wall_s, _script_us(client) / num, busy_s / wall_s))
        client.config_resetstat()
        started, cpu = _begin(barrier, pid)
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"A client ended with {process.exitcode}.")
    client.flushall()
    return rates


def _begin(barrier: Barrier, pid: int) -> tuple[float, float]:
    barrier.wait()
    return time.perf_counter(), _cpu_s(pid)


def _script_us(client: redis.Redis) -> float:
    return float(client.info("commandstats").get("cmdstat_evalsha", {}).get("usec", 0))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ps-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        assert server.process is not None
        try:
            rounds = [
                measure(server.url, server.process.pid, f"b{i}", options.requests, options.clients)
                for i in range(options.rounds)
            ]
        finally:
            server.stop()
    print(f"{processor_name()}, {os.cpu_count()} cores; {options.clients} client processes, policy {POLICY};")
    print(f"median [least - most] of {options.rounds} rounds of {options.requests} requests:")
    for stage in zip(*rounds, strict=True):
        per_s = [rate.per_s for rate in stage]
        median = statistics.median(per_s)
        server_us = statistics.median(rate.server_us for rate in stage)
        busy = statistics.median(rate.server_busy for rate in stage)
        print(
            f"  {stage[0].name:24} {median:8,.0f}/s [{min(per_s):,.0f} - {max(per_s):,.0f}], "
            f"{'at least' if median >= LEAST else 'BELOW'} {LEAST:,}; scripts {server_us:.1f} us each "
            f"(full at {1e6 / server_us:,.0f}/s), the server {busy:.0%} busy"
        )
    if options.json:
        options.json.write_text(json.dumps([[rate._asdict() for rate in row] for row in rounds], indent=1))


if __name__ == "__main__":
    main()
