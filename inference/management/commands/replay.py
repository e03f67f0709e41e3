"""`manage.py replay`: what each policy would have done with a trace, or with what was really served."""

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, get_args

from django.core.management.base import BaseCommand, CommandError

from inference.recorded import HistoryError, RecordedRun, read_history
from scheduling.core.planner import Mode
from scheduling.core.policies import POLICIES, build_policy
from scheduling.core.policy import Policy, PolicyError
from scheduling.core.simulation.admission import AdmissionSettings
from scheduling.core.simulation.chart import draw_page
from scheduling.core.simulation.outcome import ServiceTarget, ServiceTargets, SimulationResult
from scheduling.core.simulation.report import Report, Spread, build_report
from scheduling.core.simulation.simulator import SimulationSettings, simulate
from scheduling.core.simulation.table import compare_reports, format_seconds
from scheduling.core.simulation.trace import TraceError, TraceRequest, read_trace
from scheduling.core.sizing.controller import Sizing
from scheduling.core.sizing.cost_model import DEFAULT_COST, CostFileError, StepCost
from scheduling.core.sizing.strategies import SIZINGS, SizingError, build_sizing

Run = tuple[Report, SimulationResult]


class Command(BaseCommand):
    help = (
        "Simulates the fleet on a trace (CSV, gzip too; columns arrival_s, tenant, prompt_tokens, output_tokens and "
        "perhaps priority, max_tokens), or on the recorded requests of a model, and compares policies."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("trace", nargs="?", type=Path, help="the trace; without, --from-history gives the requests")
        parser.add_argument("--policies", default="", help=f"some of {','.join(POLICIES)} (all)")
        size = parser.add_mutually_exclusive_group()
        size.add_argument("--batch-size", type=int, help="most sequences in a batch (64)")
        size.add_argument("--sizing", choices=sorted(SIZINGS), help="let a controller choose the batch size")
        parser.add_argument("--replicas", type=int, help="engines that claim from the queue (1)")
        parser.add_argument("--kv-blocks", type=int, help="KV blocks of 16 tokens in each engine (16384)")
        parser.add_argument("--step-tokens", type=int, help="most tokens in one engine step (2048)")
        parser.add_argument("--mode", choices=get_args(Mode), help="how batches form (continuous)")
        parser.add_argument("--queue-limit", type=int, help="turn on backpressure with this bound on the queue (off)")
        parser.add_argument("--cost", type=Path, help="cost file of the engine (a 7B model on one large GPU)")
        parser.add_argument("--save-cost", type=Path, metavar="FILE", help="write the cost that was used")
        parser.add_argument("--from-history", metavar="MODEL", help="learn the cost from what this model recorded")
        parser.add_argument("--rate", type=float, default=1.0, help="requests come so many times as fast (1)")
        parser.add_argument("--limit", type=int, help="only the first requests of a trace, or the latest of a history")
        parser.add_argument("--ttft-target", type=float, default=5.0, metavar="S", help="SLA: time to first token (5)")
        parser.add_argument("--e2e-target", type=float, metavar="S", help="SLA: time to the last token (none)")
        parser.add_argument("--seed", type=int, default=0, help="of controllers that draw at random (0)")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
        parser.add_argument("--chart", type=Path, metavar="FILE", help="write a page with charts (HTML)")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            recorded = self._read_history(options)
            trace = self._read_trace(options, recorded)
            policies = _read_policies(options["policies"])
            cost = _read_cost(options["cost"], recorded)
            settings = [_read_settings(options, recorded, policy) for policy in policies]
        except (HistoryError, TraceError, PolicyError, SizingError, CostFileError, ValueError) as error:
            raise CommandError(str(error)) from error
        runs = [self._simulate(trace, setting, cost) for setting in settings]
        targets = settings[0].targets
        if recorded is not None and options["trace"] is None and options["rate"] == 1.0:
            served = (build_report(f"recorded ({recorded.policy})", recorded.served, targets), recorded.served)
            self.stdout.write(compare_reports([served[0], *(report for report, _ in runs)]))
            self._show_errors(served[0], [report for report, _ in runs if report.label == recorded.policy])
            runs = [served, *runs]
        else:
            self.stdout.write(compare_reports([report for report, _ in runs]))
        self._write_files(options, runs, cost, trace)

    def _read_history(self, options: dict[str, Any]) -> RecordedRun | None:
        model = options["from_history"]
        if model is None:
            return None
        if options["cost"] is not None and options["trace"] is not None:
            raise HistoryError("--cost and --from-history both give the engine's cost; name one of them.")
        recorded = read_history(model, limit=options["limit"] if options["trace"] is None else None)
        error_ms = 1000 * recorded.typical_error_s
        self.stderr.write(
            f"Learned the cost of {model} from {recorded.served.steps:,} steps; off by {error_ms:.2f} ms a step."
        )
        return recorded

    def _read_trace(self, options: dict[str, Any], recorded: RecordedRun | None) -> Sequence[TraceRequest]:
        if options["trace"] is not None:
            return read_trace(options["trace"], rate=options["rate"], limit=options["limit"])
        if recorded is None:
            raise TraceError("Name a trace, or a model with --from-history.")
        if options["rate"] <= 0:
            raise TraceError("The rate must be above 0.")
        return [request._replace(arrival_s=request.arrival_s / options["rate"]) for request in recorded.trace]

    def _simulate(self, trace: Sequence[TraceRequest], settings: SimulationSettings, cost: StepCost) -> Run:
        name, total = settings.policy.name, len(trace)
        started = time.perf_counter()

        def show(num_arrived: int) -> None:
            if sys.stderr.isatty() or num_arrived == total:
                elapsed_s = time.perf_counter() - started
                self.stderr.write(
                    f"\r{name}: {num_arrived:,} of {total:,} requests, {elapsed_s:.1f} s",
                    ending="\n" if num_arrived == total else "",
                )
                self.stderr.flush()

        result = simulate(trace, settings, cost, progress=show)
        elapsed_s = time.perf_counter() - started
        self.stderr.write(f"{name}: {result.end_s / elapsed_s:,.0f} times faster than real time")
        return build_report(name, result, settings.targets), result

    def _show_errors(self, served: Report, predicted: Sequence[Report]) -> None:
        """How far the simulation of what really happened is off."""
        for report in predicted:
            lines = [
                f"{title} mean {_off(theirs.mean, ours.mean)}, p99 {_off(theirs.p99, ours.p99)}"
                for title, theirs, ours in _latencies(served, report)
            ]
            self.stdout.write(f"\nPrediction under {report.label} against the record: {'; '.join(lines)}.")

    def _write_files(
        self, options: dict[str, Any], runs: Sequence[Run], cost: StepCost, trace: Sequence[TraceRequest]
    ) -> None:
        source = options["trace"].name if options["trace"] else f"history of {options['from_history']}"
        subtitle = (
            f"{source}: {len(trace):,} requests in {format_seconds(trace[-1].arrival_s)}, rate {options['rate']:g}"
        )
        files: list[tuple[Path | None, Callable[[Path], object]]] = [
            (options["save_cost"], cost.save),
            (options["json"], lambda path: path.write_text(_to_json(runs, source))),
            (options["chart"], lambda path: path.write_text(draw_page("Policies compared", subtitle, runs))),
        ]
        for path, write in files:
            if path is None:
                continue
            try:
                write(path)
            except OSError as error:
                raise CommandError(f"{path} cannot be written: {error.strerror}.") from error
            self.stderr.write(f"Wrote {path}.")


def _to_json(runs: Sequence[Run], source: str) -> str:
    return json.dumps({"trace": source, "reports": [report.to_dict() for report, _ in runs]}, indent=2) + "\n"


def _latencies(served: Report, predicted: Report) -> list[tuple[str, Spread, Spread]]:
    return [
        ("TTFT", served.total.ttft_s, predicted.total.ttft_s),
        ("end to end", served.total.e2e_s, predicted.total.e2e_s),
    ]


def _off(real: float | None, predicted: float | None) -> str:
    """The prediction's error as a share of what really was."""
    return f"{predicted / real - 1:+.1%}" if real and predicted is not None else "unknown"


def _read_policies(names: str) -> list[Policy]:
    return [build_policy(name.strip()) for name in (names.split(",") if names else POLICIES)]


def _read_cost(path: Path | None, recorded: RecordedRun | None) -> StepCost:
    if path is not None:
        return StepCost.load(path)
    return recorded.cost if recorded is not None else DEFAULT_COST


def _read_settings(options: dict[str, Any], recorded: RecordedRun | None, policy: Policy) -> SimulationSettings:
    """The fleet: as told, else as recorded, else the defaults."""
    sizing: Callable[[int], Sizing] | None = None
    if (name := options["sizing"]) is not None:
        sizing = lambda index: build_sizing(name, random=Random(options["seed"] + index))  # noqa: E731, S311
    defaults: dict[str, Any] = {}
    if recorded is not None:
        fields = ("num_replicas", "num_blocks", "mode", "batch_size", "step_tokens")
        defaults = {field: getattr(recorded, field) for field in fields}
    given = {
        "num_replicas": options["replicas"],
        "num_blocks": options["kv_blocks"],
        "mode": options["mode"],
        "batch_size": options["batch_size"],
        "step_tokens": options["step_tokens"],
    }
    chosen = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    if any(isinstance(value, int) and value < 1 for value in chosen.values()):
        raise ValueError("Batch size, replicas, KV blocks and step tokens are at least 1.")
    limit = options["queue_limit"]
    if limit is not None and limit < 1:
        raise ValueError("The queue's bound is at least 1.")
    target = ServiceTarget(ttft_s=options["ttft_target"], e2e_s=options["e2e_target"])
    return SimulationSettings(
        policy=policy,
        sizing=sizing,
        admission=AdmissionSettings(queue_limit=limit) if limit is not None else None,
        targets=ServiceTargets(default=target),
        **chosen,
    )
