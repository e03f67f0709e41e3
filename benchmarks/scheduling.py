"""The scheduling core: the in-memory queue, backpressure, every policy on a trace, and the simulator's own speed.

    python -m benchmarks.scheduling [TRACE] [--tenants-trace TRACE] [--rounds 3] [--limit N] [--json FILE]

Without traces only the queue is measured. TRACE (CSV, gzip too) gives the simulator's speed and the table of all
policies; the tenants' trace, with many tenants, gives fair against fifo under overload. Runs on one core; medians with
the smallest and largest over the rounds; each figure stands beside the limit it is held to.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scheduling.core.backpressure import BackpressureLimits, Level, assess, depth_limit
from scheduling.core.policies import POLICIES, build_policy
from scheduling.core.policy import Policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import Priority, QueueEntry
from scheduling.core.simulation.report import Report, build_report, light_half
from scheduling.core.simulation.simulator import SimulationSettings, simulate
from scheduling.core.simulation.table import compare_reports, format_table
from scheduling.core.simulation.trace import TraceRequest, read_trace
from scheduling.core.sizing.cost_model import DEFAULT_COST

NO_LIMIT = 2**62
NUM_TENANTS = 43
FIRST_ARRIVAL_S, APART_S = 1e9, 0.01
"""Of the requests that are made; by the last arrival most are past their deadline under `edf`, and due under `wrr`."""
OVERLOAD = 1.5
"""Requests come so many times as fast as the replica can serve them."""
BODY = b"x" * 100


class Figure(NamedTuple):
    """A measured figure: median, smallest and largest over the rounds, and what it is held to."""

    name: str
    median: float
    low: float
    high: float
    unit: str
    limit: str
    is_met: bool


def main() -> None:
    """Measure, print, and write JSON where asked."""
    options = _parse()
    print(f"Python {platform.python_version()}, {platform.machine()}, {_processor()}\n")
    figures = [figure for name in POLICIES for figure in measure_queue(name, options.rounds)]
    figures.append(measure_refusal(options.rounds))
    reports: list[Report] = []
    if options.trace:
        trace = read_trace(options.trace, limit=options.limit)
        figures.append(measure_speed(trace, options.rounds))
    _show(figures)
    if options.trace:
        print(f"\nAll policies, one replica, {options.trace.name} at {OVERLOAD:g} times what it can serve:\n")
        reports = compare_policies(trace, list(POLICIES))
        print(compare_reports(reports))
    if options.tenants_trace:
        overload = measure_fairness(read_trace(options.tenants_trace, limit=options.limit))
        print(
            f"\nfair against fifo on {options.tenants_trace.name} at {OVERLOAD:g} times what one replica can serve:\n"
        )
        _show(overload)
        figures += overload
    if options.json:
        document = {"figures": [f._asdict() for f in figures], "policies": [r.to_dict() for r in reports]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--tenants-trace", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _show(figures: list[Figure]) -> None:
    rows = [
        [f.name, f"{f.median:,.4g}", f"{f.low:,.4g} - {f.high:,.4g}", f.unit, f.limit, "met" if f.is_met else "NOT MET"]
        for f in figures
    ]
    print(format_table(["", "median", "spread", "unit", "limit", ""], rows))


def _figure(
    name: str, rounds: list[float], unit: str, *, least: float | None = None, most: float | None = None
) -> Figure:
    median = statistics.median(rounds)
    if least is not None:
        return Figure(name, median, min(rounds), max(rounds), unit, f"at least {least:,g}", median >= least)
    assert most is not None
    return Figure(name, median, min(rounds), max(rounds), unit, f"at most {most:,g}", median <= most)


def make_entries(count: int, seed: int = 1, start: int = 0) -> list[QueueEntry]:
    """Requests of many tenants, priorities and lengths."""
    draw = random.Random(seed)
    return [
        QueueEntry(
            id=f"request-{number}",
            tenant=f"tenant-{draw.randrange(NUM_TENANTS)}",
            priority=draw.choice(list(Priority)),
            arrival_s=FIRST_ARRIVAL_S + number * APART_S,
            prompt_tokens=draw.randint(1, 4000),
            max_tokens=draw.randint(1, 1000),
        )
        for number in range(start, start + count)
    ]


def _filled(policy: Policy, entries: list[QueueEntry]) -> FlowQueue:
    queue = FlowQueue(clock=lambda: 0.0)
    queue.init_policy(policy.name, policy.params, 1)
    for entry in entries:
        queue.enqueue(entry, policy.place(entry), revision=1, body=BODY, depth_limit=NO_LIMIT)
    return queue


def measure_queue(name: str, rounds: int) -> list[Figure]:
    """Rate at 10,000 queued, one decision at 100,000, and bytes a waiting request."""
    policy = build_policy(name)
    figures = measure_claims(policy, rounds, name)
    if policy.rules.late_slack_s is not None or policy.rules.promote_after_s is not None:
        figures += measure_claims(policy, rounds, f"{name}, most late or due", is_late=True)
    waiting_bytes = [_waiting_bytes(policy)]
    return [*figures, _figure(f"{name}: memory beyond a request's own fields", waiting_bytes, "bytes", most=100)]


def measure_claims(policy: Policy, rounds: int, title: str, *, is_late: bool = False) -> list[Figure]:
    """Rates and decisions: as long as nothing is late, or with the clock at the latest arrival."""
    pairs = [_pairs_per_s(policy, is_late=is_late) for _ in range(rounds)]
    singles = [_pairs_per_s(policy, at_once=1, is_late=is_late) for _ in range(rounds)]
    claims = [_claim_ms(policy, is_late=is_late) for _ in range(rounds)]
    return [
        _figure(f"{title}: enqueue+claim pairs at 10,000 queued, 32 a claim", pairs, "pairs/s", least=100_000),
        _figure(f"{title}: the same, one a claim", singles, "pairs/s", least=100_000),
        _figure(f"{title}: claim of 32 from 100,000, p99", claims, "ms", most=1.0),
    ]


def _pairs_per_s(policy: Policy, count: int = 20_000, at_once: int = 32, *, is_late: bool) -> float:
    """Requests placed, enqueued, and claimed so many at a time, while 10,000 wait; by processor time."""
    queue, entries = _filled(policy, make_entries(10_000)), make_entries(count, seed=2, start=10_000)
    gc.collect()
    started = time.thread_time()
    for first in range(0, count, at_once):
        for entry in entries[first : first + at_once]:
            queue.enqueue(entry, policy.place(entry), revision=1, body=BODY, depth_limit=NO_LIMIT)
        now = entry.arrival_s if is_late else 0.0
        queue.claim("gpu-0", max_requests=at_once, max_tokens=NO_LIMIT, lease_s=60, now=now)
    return count / (time.thread_time() - started)


def _claim_ms(policy: Policy, count: int = 1000, *, is_late: bool) -> float:
    entries = make_entries(100_000)
    queue, now = _filled(policy, entries), entries[-1].arrival_s if is_late else 0.0
    gc.collect()
    seconds = []
    for _ in range(count):
        started = time.thread_time()
        queue.claim("gpu-0", max_requests=32, max_tokens=NO_LIMIT, lease_s=60, now=now)
        seconds.append(time.thread_time() - started)
    return 1000 * sorted(seconds)[int(0.99 * count)]


def _waiting_bytes(policy: Policy, count: int = 100_000) -> float:
    """What the queue allocates for each waiting request, by tracemalloc, with 100,000 waiting.

    All but the entry, its strings and the body, which are the caller's: the index by id, the columns (rank, arrival
    number, references to entry and body), where the policy promotes also the order of arrival, and their slack.
    """
    entries = make_entries(count)
    gc.collect()
    tracemalloc.start()
    queue = _filled(policy, entries)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert queue.snapshot().depth == count
    return held / count


def measure_refusal(rounds: int, queue_limit: int = 10_000) -> Figure:
    """From the enqueue that brings the queue to a level's threshold to the refusal of the next bulk request."""
    policy, limits = build_policy("fifo"), BackpressureLimits()
    entries = make_entries(queue_limit)
    waits = []
    for _ in range(rounds):
        threshold = int(limits.depth[0] * queue_limit)
        queue = _filled(policy, entries[: threshold - 1])
        started = time.thread_time()
        for entry in entries[threshold - 1 :]:
            level = assess(limits, depth=threshold - 1, queue_limit=queue_limit, wait_s=None, kv_usage=0.0).level
            assert level is Level.NONE, "the level is still that of the moment before"
            bound = depth_limit(Priority.BULK, queue_limit, level, limits)
            if queue.enqueue(entry, policy.place(entry), revision=1, depth_limit=bound).status == "full":
                break
        waits.append(1000 * (time.thread_time() - started))
    return _figure("backpressure: threshold reached to first refusal", waits, "ms", most=10.0)


def measure_speed(trace: list[TraceRequest], rounds: int) -> Figure:
    """How many times faster than real time one replica's replay is, by processor time of one core."""
    speeds = []
    for _ in range(rounds):
        gc.collect()
        started = time.thread_time()
        result = simulate(trace, SimulationSettings(policy=build_policy("fifo")), DEFAULT_COST)
        speeds.append(result.end_s / (time.thread_time() - started))
    return _figure("simulator: virtual over processor time, one replica", speeds, "times", least=300)


def compare_policies(trace: list[TraceRequest], names: list[str]) -> list[Report]:
    """The trace under each policy, all on one overloaded replica."""
    overloaded = overload(trace)
    reports = []
    for name in names:
        settings = SimulationSettings(policy=build_policy(name))
        reports.append(build_report(name, simulate(overloaded, settings, DEFAULT_COST), settings.targets))
    return reports


def overload(trace: list[TraceRequest], factor: float = OVERLOAD) -> list[TraceRequest]:
    """The trace sped up until requests come `factor` times as fast as one replica serves them when it is never idle."""
    at_once = [request._replace(arrival_s=0.0) for request in trace]
    capacity_s = simulate(at_once, SimulationSettings(policy=build_policy("fifo")), DEFAULT_COST).end_s
    squeeze = capacity_s / factor / max(trace[-1].arrival_s, 1e-9)
    return [request._replace(arrival_s=request.arrival_s * squeeze) for request in trace]


def measure_fairness(trace: list[TraceRequest]) -> list[Figure]:
    """What fair changes against fifo: throughput while both are backlogged, and the light tenants' first tokens."""
    fifo, fair = compare_policies(trace, ["fifo", "fair"])
    names = light_half(fifo)
    read: Callable[[Report], float] = lambda report: statistics.mean(  # noqa: E731
        report.tenants[name].ttft_s.mean or 0.0 for name in names
    )
    gain = read(fifo) / read(fair)
    lost = [100 * abs(1 - fair.tokens_per_s / fifo.tokens_per_s)]
    return [
        _figure("throughput, difference of fair from fifo", lost, "%", most=1.0),
        _figure(
            f"mean TTFT of the {len(names)} lightest tenants, fifo over fair",
            [gain],
            "times",
            least=20,
        ),
    ]


if __name__ == "__main__":
    main()
