"""One workload through every system, in turn: tokens/s, times to tokens, processor time, shares of the limit."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import transformers

from benchmarks.engine_peers import PeerMissingError, run_llama_cpp, run_vllm
from benchmarks.modes import (
    SIZES,
    SLOTS,
    Answers,
    Request,
    make_workload,
    run_generate,
    run_ours,
    run_transformers_continuous,
)
from benchmarks.roofline import MeteredRunner
from inference.messages import BatchMode

ONE_BY_ONE = "transformers one by one"
ONE_BY_ONE_REQUESTS = 8
"""Of the workload, for the slowest system."""


class Record:
    """What the rounds of one system gave."""

    def __init__(self) -> None:
        self.tokens_per_s: list[float] = []
        self.ttft_s: list[float] = []
        self.tpot_s: list[float] = []
        self.cpu_s: list[float] = []
        self.limit: list[float] = []
        self.outside: list[float] = []
        self.same = 0

    def add(self, answers: Answers, seconds: float) -> None:
        """A round."""
        self.tokens_per_s.append(sum(len(a.tokens) for a in answers) / seconds)
        self.ttft_s.append(statistics.median(a.times_s[0] for a in answers if a.times_s))
        spans = [(a.times_s[-1] - a.times_s[0]) / (len(a.times_s) - 1) for a in answers if len(a.times_s) > 1]
        self.tpot_s.append(statistics.median(spans))


def compare_systems(
    runner: MeteredRunner, path: Path, size: str, rounds: int, num_requests: int, peers: bool
) -> dict[str, Any]:
    """Run every system `rounds` times in turn; peers run their rounds by themselves, after the others."""
    workload = make_workload(num_requests, SIZES[size]["vocab_size"])
    systems = _systems(runner, path)
    records = {name: Record() for name in systems}
    expected: Answers = []
    for run in systems.values():
        run([Request(r.prompt[:32], 4) for r in workload[:2]])
    for number in range(rounds):
        for name, run in systems.items():
            asked = workload[:ONE_BY_ONE_REQUESTS] if name == ONE_BY_ONE else workload
            start, used = time.perf_counter(), time.process_time()
            answers = run(asked)
            seconds, record = time.perf_counter() - start, records[name]
            record.add(answers, seconds)
            record.cpu_s.append((time.process_time() - used) * len(workload) / len(asked))
            expected = expected or answers
            record.same = _count_same(answers, expected)
            if name in get_args(BatchMode):
                record.limit.append(runner.least_s / record.cpu_s[-1])
                record.outside.append(runner.outside)
            print(f"  round {number + 1}: {name} {record.tokens_per_s[-1]:.1f} tokens/s", flush=True)
    missing = _run_peers(records, path, size, workload, rounds, expected) if peers else {}
    return {
        "requests": num_requests, "prompt_tokens": sum(len(r.prompt) for r in workload),
        "output_tokens": sum(r.num_tokens for r in workload), "missing": missing,
        "systems": {name: vars(record) for name, record in records.items()},
    }  # fmt: skip


def _systems(runner: MeteredRunner, path: Path) -> dict[str, Callable[[list[Request]], Answers]]:
    models = [transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2)]
    ours = {mode: partial(run_ours, runner, mode) for mode in get_args(BatchMode)}
    return {
        **ours,
        ONE_BY_ONE: partial(run_generate, models[0], 1),
        "transformers static": partial(run_generate, models[0], SLOTS),
        "transformers continuous": partial(run_transformers_continuous, models[1]),
    }


def _run_peers(
    records: dict[str, Record], path: Path, size: str, workload: list[Request], rounds: int, expected: Answers
) -> dict[str, str]:
    """Add the peers' records; returns why each that is missing is."""
    peers: dict[str, Callable[[], list[tuple[float, Answers]]]] = {
        "llama.cpp float32": partial(run_llama_cpp, path, size, workload, rounds),
        "vLLM eager": partial(run_vllm, path, workload, compiled=False, rounds=rounds),
        "vLLM compiled": partial(run_vllm, path, workload, compiled=True, rounds=rounds),
    }
    missing = {}
    for name, run in peers.items():
        try:
            found = run()
        except PeerMissingError as error:
            missing[name] = str(error)
            print(f"  {name} is missing: {error}")
            continue
        records[name] = record = Record()
        for seconds, answers in found:
            record.add(answers, seconds)
            record.same = _count_same(answers, expected)
        print(f"  {name} {record.tokens_per_s[-1]:.1f} tokens/s", flush=True)
    return missing


def _count_same(answers: Answers, expected: Answers) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(answers, expected, strict=False))


def report_systems(result: dict[str, Any]) -> dict[str, float]:
    """Print the table; returns how many times as fast as each other system `continuous` is."""
    systems = result["systems"]
    print(
        f"  {result['requests']} requests, {result['prompt_tokens']} prompt tokens, "
        f"{result['output_tokens']} output tokens, {SLOTS} slots; one by one: the first {ONE_BY_ONE_REQUESTS}"
    )
    print(f"  {'':<25}{'tokens/s':>9}{'least':>9}{'most':>9}{'TTFT s':>8}{'TPOT ms':>9}{'CPU s':>8}"
          f"{'of limit':>10}{'outside':>9}{'ratio':>7}  same answers")  # fmt: skip
    ratios = {}
    for name, record in systems.items():
        rates = record["tokens_per_s"]
        ratios[name] = statistics.median(systems["continuous"]["tokens_per_s"]) / statistics.median(rates)
        cpu = f"{min(record['cpu_s']):.2f}" if record["cpu_s"] else ""
        limit = f"{max(record['limit']):.0%}" if record["limit"] else ""
        outside = f"{min(record['outside']):.1%}" if record["outside"] else ""
        print(
            f"  {name:<25}{statistics.median(rates):>9.1f}{min(rates):>9.1f}{max(rates):>9.1f}"
            f"{statistics.median(record['ttft_s']):>8.2f}{statistics.median(record['tpot_s']) * 1000:>9.2f}"
            f"{cpu:>8}{limit:>10}{outside:>9}{ratios[name]:>7.2f}  {record['same']}"
        )
    return ratios
