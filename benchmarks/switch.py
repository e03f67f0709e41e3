"""Switches the policy of a queue in Redis while it is claimed from: how long until every claimer works by the new one.

    python -m benchmarks.switch [--queued 10000] [--rounds 9] [--claimers 4] [--json FILE]

Claimers are processes of their own, as engines are. A claim waits for the server's one thread, and beside that for a
processor, on whichever side; so beside the longest claim that a claimer saw stands what the server itself says that
held it up: the longest step of the switch and the longest command of all (SLOWLOG; another claim's, where the server
lost its processor in the midst of it), and its longest other work (LATENCY: a fork for its append-only file, a write of
it). All are by the clock, so beside them stands for how long in all the server had to wait for a processor: where that
is little, they are its own.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from random import Random
from typing import NamedTuple

import redis

from benchmarks.entries import draw_entries
from benchmarks.modes import processor_name
from benchmarks.stack import RedisServer
from scheduling.core.policies import build_policy
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.store import execute, execute_many, load_script
from scheduling.switch import switch_policy

POLICIES = ("fair", "priority", "edf", "size", "fifo")
PREFIX = "bench"
STEPS = {load_script(f"switch_{name}").sha.encode() for name in ("begin", "build", "flip", "end")}
PAUSE_S = 0.005
"""Between two claims of one claimer: about the length of an engine step."""


class Claims(NamedTuple):
    """What a claimer got and saw; times are of the clock that all processes share."""

    ids: list[str]
    taken: list[tuple[float, float]]
    """When each claim was answered, and how long it took."""
    switched: float
    """When one first came back under the new revision."""


def claim_until(
    url: str, model: str, owner: str, revision: int, begun: Barrier, results: "SimpleQueue[Claims]"
) -> None:
    """In the place of an engine process: claim one request a step, and keep it, until `revision` is in force."""
    client, queue = redis.Redis.from_url(url), FleetQueue(Keys(PREFIX), model)
    ids: list[str] = []
    taken: list[tuple[float, float]] = []
    while True:
        started = time.perf_counter()
        claimed = execute(client, queue.claim(owner, max_requests=1, max_tokens=2**31 - 1, lease_s=600))
        now = time.perf_counter()
        taken.append((now, now - started))
        ids += [request.id for request in claimed.requests]
        if claimed.revision == revision:
            break
        if len(taken) == 1:
            begun.wait()
        time.sleep(PAUSE_S)
    results.put(Claims(ids, taken, now))


def fill(client: redis.Redis, queue: FleetQueue, num_queued: int, revision: int, random: Random) -> list[str]:
    """Enqueue requests of 40 tenants and all priorities; returns their ids."""
    active = execute(client, queue.active_policy())
    policy = build_policy(active.name, active.params)
    entries = draw_entries(random, str(revision), num_queued)
    for start in range(0, num_queued, 500):
        execute_many(
            client,
            [
                queue.enqueue(entry, policy.place(entry), revision=active.revision, body=b"x" * 200, depth_limit=10**9)
                for entry in entries[start : start + 500]
            ],
        )
    return [entry.id for entry in entries]


def drain(client: redis.Redis, queue: FleetQueue) -> list[str]:
    """Claim what is left. A claim may give nothing while it moves requests that are late behind the others."""
    ids: list[str] = []
    depth = 1
    while depth:
        claimed = execute(client, queue.claim("rest", max_requests=500, max_tokens=2**31 - 1, lease_s=600))
        ids += [request.id for request in claimed.requests]
        depth = claimed.depth
    return ids


def measure(server: RedisServer, num_queued: int, num_claimers: int, revision: int) -> dict[str, float]:
    """One switch. Raises RuntimeError where a request was lost or doubled."""
    client, model = redis.Redis.from_url(server.url), f"switch-{revision}"
    queue = FleetQueue(Keys(PREFIX), model)
    ids = fill(client, queue, num_queued, revision, Random(revision))
    context = multiprocessing.get_context("spawn")
    begun, results = context.Barrier(num_claimers + 1), context.SimpleQueue()
    claimers = [
        context.Process(target=claim_until, args=(server.url, model, f"gpu-{number}", revision, begun, results))
        for number in range(num_claimers)
    ]
    for claimer in claimers:
        claimer.start()
    begun.wait(60)
    assert server.process is not None
    waited_s = _waited_s(server.process.pid)
    _watch(client)
    started = time.perf_counter()
    result = switch_policy(client, queue, build_policy(POLICIES[revision % len(POLICIES)]), revision)
    claims = [results.get() for _ in claimers]
    held_up = _held_up_ms(client)
    waited_s = _waited_s(server.process.pid) - waited_s
    for claimer in claimers:
        claimer.join()
    got = Counter([id_ for claim in claims for id_ in claim.ids] + drain(client, queue))
    if got != Counter(ids):
        raise RuntimeError(f"{len(set(ids) - got.keys())} requests were lost and {got.total() - len(got)} doubled.")
    return {
        "switch_ms": 1000 * result.seconds,
        "everywhere_ms": 1000 * (max(claim.switched for claim in claims) - started),
        "longest_claim_ms": 1000 * max(took for claim in claims for now, took in claim.taken if now > started),
        **held_up,
        "server_waited_ms": 1000 * waited_s,
    }


def _watch(client: redis.Redis) -> None:
    """Have the server note what holds it up from now on: commands of 0.1 ms and more, other work of 1 ms and more."""
    client.config_set("slowlog-max-len", 100_000)
    client.slowlog_reset()
    client.execute_command("LATENCY", "RESET")
    client.config_set("latency-monitor-threshold", 1)
    client.config_set("slowlog-log-slower-than", 100)


def _waited_s(pid: int) -> float:
    """For how long a process's main thread was ready to run while others had the processors (proc(5), schedstat)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def _held_up_ms(client: redis.Redis) -> dict[str, float]:
    """For how long the server did nothing else, at most."""
    client.config_set("slowlog-log-slower-than", -1)
    client.config_set("latency-monitor-threshold", 0)
    commands = client.slowlog_get(-1)
    steps = [command for command in commands if command["command"].split(b" ")[1] in STEPS]
    other = [event for event in client.execute_command("LATENCY", "LATEST") if not event[0].endswith(b"command")]
    return {
        "server_step_ms": max((step["duration"] for step in steps), default=0) / 1000,
        "server_command_ms": max((command["duration"] for command in commands), default=0) / 1000,
        "server_other_ms": max((float(event[3]) for event in other), default=0.0),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--claimers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ps-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        try:
            rows = [measure(server, options.queued, options.claimers, i) for i in range(1, options.rounds + 1)]
        finally:
            server.stop()
    print(f"{processor_name()}; {options.queued} queued, {options.claimers} claimers, {options.rounds} rounds;")
    print("nothing lost, nothing doubled in any. Median [least - most], ms:")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"  {name:18} {statistics.median(values):8.1f} [{min(values):.1f} - {max(values):.1f}]")
    if options.json:
        options.json.write_text(json.dumps({"queued": options.queued, "rounds": rows}, indent=1))


if __name__ == "__main__":
    main()
