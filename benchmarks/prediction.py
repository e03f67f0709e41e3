"""The simulator against the real engine: the same requests at the same times, served for real and predicted.

    python -m benchmarks.prediction [--size demo] [--learn 30] [--seconds 40] [--loads 0.5,0.8,1.2] [--processor-time]
        [--json FILE]

A model runner serves seeded random traffic in real time, in one process, through the planner that engine processes
use; its steps teach the step-time model. Then other traffic is served at several shares of the engine's capacity, and
each run is simulated twice: with the cost learned from the run itself, as a replay of history does, and with the cost
learned before it, which is also off by what else the machine did meanwhile. Printed: real and predicted mean and p99 of
time to first token and end to end, and the error. The aim is 10 % on the mean and 20 % on the p99.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.modes import SIZES, make_checkpoint, processor_name
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.policies import build_policy
from scheduling.core.sequence import SamplingParams
from scheduling.core.simulation.outcome import Outcome, ServiceTargets, SimulationResult
from scheduling.core.simulation.replica import SimulatedSequence
from scheduling.core.simulation.report import Report, build_report
from scheduling.core.simulation.simulator import SimulationSettings, simulate
from scheduling.core.simulation.table import format_seconds, format_table
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import StepCost, StepTimeModel, measure_parts

SLOTS = 16
STEP_TOKENS = 512
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
AIM_MEAN, AIM_P99 = 0.10, 0.20


def make_trace(rate: float, seconds: float, seed: int) -> list[TraceRequest]:
    """Poisson arrivals, prompts of 16 to 256 tokens, answers of 8 to 256 with a heavy tail."""
    draw, clock, trace = random.Random(seed), 0.0, []
    while (clock := clock + draw.expovariate(rate)) < seconds:
        output = min(255, int(8 * draw.paretovariate(0.8)))
        trace.append(TraceRequest(clock, draw.choice("ab"), draw.randint(16, 256), output, 3, output))
    return trace


class Clock:
    """Seconds since it was made: of real time, or of processor time, which what else runs touches little."""

    def __init__(self, *, counts_processor: bool) -> None:
        self._read = time.process_time if counts_processor else time.perf_counter
        self._counts_processor = counts_processor
        self._start_s = self._read()

    def now(self) -> float:
        return self._read() - self._start_s

    def wait_until(self, time_s: float) -> None:
        """Sleep; processor time jumps there instead."""
        missing_s = max(0.0, time_s - self.now())
        if self._counts_processor:
            self._start_s -= missing_s
        else:
            time.sleep(missing_s)


def serve(runner: ModelRunner, trace: list[TraceRequest], model: StepTimeModel, clock: Clock) -> SimulationResult:
    """Serve a trace, first come, first served; steps teach the model, with all that lies between them."""
    allocator = BlockAllocator(runner.num_blocks, runner.block_size)
    planner = StepPlanner("continuous", SLOTS, STEP_TOKENS, allocator, runner.max_model_len, clock.now)
    outcomes = [Outcome(request) for request in trace]
    waiting: deque[int] = deque()
    arrivals = deque(range(len(trace)))
    steps, busy_s, previous_s = 0, 0.0, None
    while arrivals or waiting or planner.sequences:
        now_s = clock.now()
        while arrivals and trace[arrivals[0]].arrival_s <= now_s:
            waiting.append(arrivals.popleft())
        while waiting and planner.room().requests and planner.room().tokens >= trace[waiting[0]].prompt_tokens:
            number = waiting.popleft()
            outcomes[number].claimed_s = now_s
            planner.add(_sequence(number, outcomes[number], runner.vocab_size))
        parts = planner.plan(now_s)
        if not parts:
            previous_s = None
            clock.wait_until(trace[arrivals[0]].arrival_s)
            continue
        features = measure_parts(parts)
        results = runner.step(parts)
        end_s = clock.now()
        seconds = end_s - (previous_s if previous_s is not None else now_s)
        previous_s = end_s
        model.observe(features, seconds)
        steps, busy_s = steps + 1, busy_s + seconds
        for output in planner.apply(parts, results):
            if output.error:
                raise RuntimeError(output.error)
            outcome = outcomes[int(output.sequence.id)]
            outcome.first_token_s = end_s if outcome.first_token_s is None else outcome.first_token_s
            if output.finish:
                outcome.finished_s, outcome.state = end_s, "finished"
    return _result(outcomes, steps, busy_s, planner.num_preemptions)


def _sequence(number: int, outcome: Outcome, vocab_size: int) -> SimulatedSequence:
    draw = random.Random(number)
    sequence = SimulatedSequence(str(number), 1, outcome)
    sequence.tokens = [draw.randrange(3, vocab_size) for _ in range(outcome.request.prompt_tokens)]
    sequence.sampling = GREEDY
    return sequence


def _result(outcomes: list[Outcome], steps: int, busy_s: float, preemptions: int) -> SimulationResult:
    return SimulationResult(
        outcomes=outcomes,
        end_s=max(o.finished_s or 0.0 for o in outcomes),
        steps=steps,
        busy_s=busy_s,
        preemptions=preemptions,
        batch_sizes=Counter(),
        size_changes=[],
        num_replicas=1,
    )


def predict(trace: list[TraceRequest], cost: StepCost, runner: ModelRunner) -> SimulationResult:
    """The same traffic in the simulator."""
    settings = SimulationSettings(
        policy=build_policy("fifo"),
        batch_size=SLOTS,
        step_tokens=STEP_TOKENS,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_model_len=runner.max_model_len,
    )
    return simulate(trace, settings, cost)


def capacity(cost: StepCost, runner: ModelRunner) -> float:
    """Requests a second that an engine with this cost can serve."""
    trace = [request._replace(arrival_s=0.0) for request in make_trace(20.0, 60.0, seed=99)]
    return len(trace) / predict(trace, cost, runner).end_s


def compare(name: str, real: Report, predicted: Report) -> list[dict[str, Any]]:
    """Rows of real, predicted and error."""
    rows = []
    for title, theirs, ours in (
        ("TTFT", real.total.ttft_s, predicted.total.ttft_s),
        ("end to end", real.total.e2e_s, predicted.total.e2e_s),
    ):
        for figure, aim in (("mean", AIM_MEAN), ("p99", AIM_P99)):
            true, guess = getattr(theirs, figure), getattr(ours, figure)
            error = guess / true - 1
            rows.append(
                {"load": name, "figure": f"{title} {figure}", "real_s": true, "predicted_s": guess, "error": error,
                 "aim": aim, "met": abs(error) <= aim}
            )  # fmt: skip
    return rows


def main() -> None:
    """Learn, serve, predict, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--learn", type=float, default=30.0, help="seconds of traffic that teach the cost")
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds of traffic at each load")
    parser.add_argument("--loads", default="0.5,0.8,1.2", help="shares of the engine's capacity")
    parser.add_argument("--processor-time", action="store_true", help="run by processor time: for a busy machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(options.size, Path(folder))
        settings: dict[str, Any] = {"dtype": "float32", "max_batch_size": SLOTS, "step_tokens": STEP_TOKENS}
        runner = ModelRunner(DeploymentSpec(name="bench", path=str(path), **settings), "cpu")
        rows = measure(runner, options)
    table = [
        [f"{row['load']}: {row['figure']}", format_seconds(row["real_s"]), format_seconds(row["predicted_s"]),
         f"{row['error']:+.1%}", f"{row['aim']:.0%}", "met" if row["met"] else "NOT MET"]
        for row in rows
    ]  # fmt: skip
    print(format_table(["", "real", "predicted", "error", "aim", ""], table))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(runner: ModelRunner, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Learn the cost from traffic of changing load, then serve and predict each load."""

    def run(trace: list[TraceRequest], model: StepTimeModel) -> SimulationResult:
        return serve(runner, trace, model, Clock(counts_processor=options.processor_time))

    model = StepTimeModel(forgetting=0.9999)
    run(make_trace(4.0, 5.0, seed=7), StepTimeModel())
    for number, rate in enumerate((2.0, 8.0, 20.0)):
        run(make_trace(rate, options.learn / 3, seed=number), model)
    most = capacity(model.mean_cost, runner)
    print(f"Learned from {model.num_observations} steps, typically off by {1000 * model.typical_error_s:.2f} ms:")
    print(f"{model.mean_cost}\nCapacity: {most:.1f} requests/s\n")
    rows, targets = [], ServiceTargets()
    for load in (float(text) for text in options.loads.split(",")):
        trace = make_trace(load * most, options.seconds, seed=round(1000 * load))
        before = model.mean_cost
        lately = StepTimeModel(before, forgetting=0.9999, confidence=1.0)
        real = run(trace, lately)
        report = build_report("real", real, targets)
        predicted = build_report("replayed", predict(trace, lately.mean_cost, runner), targets)
        foretold = build_report("foretold", predict(trace, before, runner), targets)
        step = format_seconds(real.busy_s / real.steps)
        print(f"load {load:g}: {len(trace)} requests in {real.steps} steps of {step}", flush=True)
        rows += compare(f"load {load:g}, cost learned from it", report, predicted)
        rows += compare(f"load {load:g}, cost learned before", report, foretold)
    print()
    return rows


if __name__ == "__main__":
    main()
