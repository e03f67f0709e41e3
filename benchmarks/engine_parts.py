"""Our engine by itself: steps of growing batches, what shared beginnings save, what a long prompt costs others."""

import random
import statistics
import time
from typing import Any

from benchmarks.modes import GREEDY, MAX_MODEL_LEN, SIZES, Answers, Request, drive, make_sequence
from benchmarks.roofline import MeteredRunner
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import Sequence, StepPart

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXT = 160
STEPS = 24
SHARED_BLOCKS, PROMPT_BLOCKS, GROUPS = 6, 16, 4
"""So many of a prompt's blocks are those of its group: 36 % of all blocks were there before."""
LOAD = 0.6
"""Of the rate at which requests without shared blocks are served."""
BUDGET = 64
STREAMS = 15


def measure_scaling(runner: MeteredRunner, size: str) -> dict[int, dict[str, float]]:
    """Decode steps at CONTEXT tokens, the shortest of several: tokens/s beside batch 1, and at the limit."""
    found: dict[int, dict[str, float]] = {}
    blocks = CONTEXT // runner.block_size
    print(
        f"  decode steps at context {CONTEXT}; {'batch':>6}{'ms':>9}{'tokens/s':>10}{'x batch 1':>11}{'at limit':>10}"
    )
    for batch in BATCHES:
        parts = []
        for i in range(batch):
            sequence = make_sequence(i, Request([5 + i] * CONTEXT, 1))
            sequence.num_computed = CONTEXT - 1
            sequence.block_table = list(range(i * blocks, (i + 1) * blocks))
            parts.append(StepPart(sequence, 1, samples=True))
        runner.reset()
        for _ in range(STEPS):
            runner.step(parts)
        step_s, least_s = min(runner.steps_s), runner.least_s / STEPS
        found[batch] = {"step_ms": step_s * 1000, "tokens_per_s": batch / step_s, "least_cpu_ms": least_s * 1000}
        found[batch]["over_one"] = found[batch]["tokens_per_s"] / found[1]["tokens_per_s"]
        found[batch]["limit_over_one"] = batch * found[1]["least_cpu_ms"] / found[batch]["least_cpu_ms"]
        row = found[batch]
        print(
            f"  {'':<28}{batch:>6}{row['step_ms']:>9.2f}{row['tokens_per_s']:>10.0f}{row['over_one']:>11.2f}"
            f"{row['limit_over_one']:>10.2f}"
        )
    return found


def measure_prefix(runner: MeteredRunner, size: str, num_requests: int) -> dict[str, Any]:
    """TTFT of the same requests with and without reuse of blocks, at a rate that is kept up with even without it."""
    rng, vocab = random.Random(7), SIZES[size]["vocab_size"]

    def tokens(blocks: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(blocks * runner.block_size)]

    shared = [tokens(SHARED_BLOCKS) for _ in range(GROUPS)]
    workload = [
        Request(shared[i % GROUPS] + tokens(PROMPT_BLOCKS - SHARED_BLOCKS), rng.randint(8, 32))
        for i in range(num_requests)
    ]
    start = time.perf_counter()
    _serve(runner, workload, None, reuse=False)
    gap_s = (time.perf_counter() - start) / num_requests / LOAD
    arrivals = [0.0]
    while len(arrivals) < num_requests:
        arrivals.append(arrivals[-1] + rng.expovariate(1 / gap_s))
    found: dict[str, Any] = {}
    answers: dict[str, Answers] = {}
    for name, reuse in (("without", False), ("with", True)):
        answers[name], hit = _serve(runner, workload, arrivals, reuse=reuse)
        times = [a.times_s[0] for a in answers[name]]
        found[name] = {"ttft_ms": statistics.median(times) * 1000, "mean_ttft_ms": statistics.fmean(times) * 1000}
        found[name]["hit"] = hit
        print(
            f"  shared beginnings, {name} reuse: TTFT p50 {found[name]['ttft_ms']:.1f} ms, mean "
            f"{found[name]['mean_ttft_ms']:.1f} ms; {hit:.0%} of prompt blocks found"
        )
    found["same"] = [a.tokens for a in answers["with"]] == [a.tokens for a in answers["without"]]
    found["gain"] = found["without"]["ttft_ms"] / found["with"]["ttft_ms"]
    print(f"  TTFT {found['gain']:.2f} times shorter at p50, same answers: {found['same']}")
    return found


def _serve(
    runner: MeteredRunner, workload: list[Request], arrivals_s: list[float] | None, *, reuse: bool
) -> tuple[Answers, float]:
    """Answers, and the share of prompt tokens found in the cache."""
    runner.reset()
    allocator = BlockAllocator(runner.num_blocks, runner.block_size)
    prefix = PrefixCache(allocator, key=b"benchmark") if reuse else None
    planner = StepPlanner("continuous", 16, 512, allocator, runner.max_model_len, time.monotonic, prefix=prefix)
    sequences = [make_sequence(i, request) for i, request in enumerate(workload)]
    answers = drive(planner, runner, sequences, arrivals_s)
    return answers, prefix.num_hit_tokens / prefix.num_tokens if prefix and prefix.num_tokens else 0.0


def measure_long_prompt(runner: MeteredRunner, size: str) -> dict[str, Any]:
    """Time between the tokens of running streams while a prompt of eight budgets comes, in chunks and at once."""
    length = min(8 * BUDGET, MAX_MODEL_LEN - 8) // 8 * 8
    budget, found = length // 8, {}
    full_s = _full_step_s(runner, budget)
    for name, step_tokens in (("chunked", budget), ("at once", length + STREAMS)):
        gaps: list[float] = []
        for repeat in range(3):
            gaps += _gaps_beside(runner, length, step_tokens, seed=repeat)
        gaps.sort()
        found[name] = {"p50_ms": gaps[len(gaps) // 2] * 1000, "p99_ms": gaps[int(len(gaps) * 0.99)] * 1000}
        found[name]["most_ms"] = gaps[-1] * 1000
        print(
            f"  a prompt of {length} tokens beside {STREAMS} streams, {name}: time between tokens p50 "
            f"{found[name]['p50_ms']:.1f}, p99 {found[name]['p99_ms']:.1f}, most {gaps[-1] * 1000:.1f} ms"
        )
    share = found["chunked"]["p99_ms"] / 1000 / full_s
    print(f"  a step of the whole budget of {budget} tokens takes {full_s * 1000:.1f} ms: p99 is {share:.2f} of them")
    return {**found, "budget_step_ms": full_s * 1000, "p99_over_budget_step": share}


def _full_step_s(runner: MeteredRunner, budget: int) -> float:
    """Seconds of a step that computes the whole budget: the streams' tokens and a chunk of a prompt."""
    blocks = MAX_MODEL_LEN // runner.block_size
    parts = []
    for i in range(STREAMS + 1):
        computed = CONTEXT if i < STREAMS else MAX_MODEL_LEN - budget
        count = 1 if i < STREAMS else budget - STREAMS
        sequence = make_sequence(i, Request([7] * (computed + count), 1))
        sequence.num_computed, sequence.block_table = computed, list(range(i * blocks, (i + 1) * blocks))
        parts.append(StepPart(sequence, count, samples=True))
    runner.reset()
    for _ in range(9):
        runner.step(parts)
    return statistics.median(runner.steps_s)


def _gaps_beside(runner: MeteredRunner, length: int, step_tokens: int, seed: int) -> list[float]:
    """Seconds between tokens of the streams from the step in which a long prompt comes to the one that ends it."""
    rng = random.Random(seed)
    allocator = BlockAllocator(runner.num_blocks, runner.block_size)
    planner = StepPlanner("continuous", STREAMS + 1, step_tokens, allocator, runner.max_model_len, time.monotonic)
    streams = [make_sequence(i, Request([rng.randrange(3, 4000) for _ in range(32)], 200)) for i in range(STREAMS)]
    late = make_sequence(STREAMS, Request([rng.randrange(3, 4000) for _ in range(length)], 4))
    assert late.sampling == GREEDY
    for stream in streams:
        planner.add(stream)
    while min(stream.num_output_tokens for stream in streams) < 4:
        _turn(planner, runner)
    planner.add(late)
    last = dict.fromkeys((stream.id for stream in streams), time.perf_counter())
    gaps = []
    while not late.num_output_tokens:
        for sequence in _turn(planner, runner):
            now = time.perf_counter()
            if sequence is not late:
                gaps.append(now - last[sequence.id])
                last[sequence.id] = now
    planner.clear()
    return gaps


def _turn(planner: StepPlanner, runner: MeteredRunner) -> list[Sequence]:
    """One step; the sequences that got a token."""
    parts = planner.plan(time.monotonic())
    return [output.sequence for output in planner.apply(parts, runner.step(parts))]
