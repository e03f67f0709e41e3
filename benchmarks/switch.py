"""Switches the policy of a queue in Redis while it is claimed from: how long until every claimer works by the new one.

    python -m benchmarks.switch [--queued 10000] [--rounds 9] [--claimers 4] [--json FILE]

Beside the longest claim stands what the server says (LATENCY) that it was held up for meanwhile: by a script, which a
claim had to wait for, and by anything else (a fork for its append-only file, a write of it).
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import redis

from benchmarks.entries import draw_entries
from benchmarks.modes import processor_name
from benchmarks.stack import RedisServer
from scheduling.core.policies import build_policy
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.store import execute, execute_many
from scheduling.switch import switch_policy

POLICIES = ("fair", "priority", "edf", "size", "fifo")
PAUSE_S = 0.005
"""Between two claims of one claimer: about the length of an engine step."""


@dataclass(slots=True)
class Claimer:
    """A thread in the place of one engine process: claims one request a step and keeps it."""

    client: redis.Redis
    queue: FleetQueue
    name: str
    ids: list[str] = field(default_factory=list)
    longest_claim_s: float = 0.0
    seen: dict[int, float] = field(default_factory=dict)
    """Revision -> when a claim first came back under it."""

    def run(self, stop: threading.Event) -> None:
        """Claim until told to stop."""
        while not stop.wait(PAUSE_S):
            started = time.perf_counter()
            claimed = execute(
                self.client, self.queue.claim(self.name, max_requests=1, max_tokens=2**31 - 1, lease_s=600)
            )
            now = time.perf_counter()
            self.longest_claim_s = max(self.longest_claim_s, now - started)
            self.seen.setdefault(claimed.revision, now)
            self.ids += [request.id for request in claimed.requests]


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
    client = redis.Redis.from_url(server.url)
    queue = FleetQueue(Keys("bench"), f"switch-{revision}")
    ids = fill(client, queue, num_queued, revision, Random(revision))
    stop = threading.Event()
    claimers = [Claimer(redis.Redis.from_url(server.url), queue, f"gpu-{i}") for i in range(num_claimers)]
    threads = [threading.Thread(target=claimer.run, args=(stop,)) for claimer in claimers]
    for thread in threads:
        thread.start()
    while not all(claimer.ids for claimer in claimers):
        stop.wait(PAUSE_S)
    for claimer in claimers:
        claimer.longest_claim_s = 0.0
    client.config_set("latency-monitor-threshold", 1)
    client.execute_command("LATENCY", "RESET")
    started = time.perf_counter()
    result = switch_policy(client, queue, build_policy(POLICIES[revision % len(POLICIES)]), revision)
    while not all(revision in claimer.seen for claimer in claimers):
        stop.wait(PAUSE_S)
    stop.set()
    for thread in threads:
        thread.join()
    held_up = _held_up_ms(client)
    got = Counter([id_ for claimer in claimers for id_ in claimer.ids] + drain(client, queue))
    if got != Counter(ids):
        raise RuntimeError(f"{len(set(ids) - got.keys())} requests were lost and {got.total() - len(got)} doubled.")
    return {
        "switch_ms": 1000 * result.seconds,
        "everywhere_ms": 1000 * (max(claimer.seen[revision] for claimer in claimers) - started),
        "longest_claim_ms": 1000 * max(claimer.longest_claim_s for claimer in claimers),
        "longest_script_ms": max(held_up.pop("command", 0.0), held_up.pop("fast-command", 0.0)),
        "longest_other_ms": max(held_up.values(), default=0.0),
    }


def _held_up_ms(client: redis.Redis) -> dict[str, float]:
    """Event -> the longest time for which the server did nothing else, of those of 1 ms and more."""
    events = client.execute_command("LATENCY", "LATEST")
    client.config_set("latency-monitor-threshold", 0)
    return {event[0].decode(): float(event[3]) for event in events}


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
