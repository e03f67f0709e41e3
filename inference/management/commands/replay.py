"""`manage.py replay`: what each policy would have done with a trace, or with what was really served."""

import json
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError

from inference.recorded import HistoryError, RecordedRun, read_history
from inference.replay_options import (
    ReplayOptionError,
    add_fleet_arguments,
    read_policies,
    read_settings,
    read_tenants,
    with_weights,
)
from scheduling.core.policy import PolicyError
from scheduling.core.simulation.chart import draw_page
from scheduling.core.simulation.outcome import SimulationResult
from scheduling.core.simulation.report import Report, Spread, build_report
from scheduling.core.simulation.settings import SimulationSettings
from scheduling.core.simulation.simulator import simulate
from scheduling.core.simulation.table import compare_reports, format_seconds
from scheduling.core.simulation.trace import TraceError, TraceRequest, read_trace
from scheduling.core.sizing.cost_model import DEFAULT_COST, CostFileError, StepCost
from scheduling.core.sizing.strategies import SizingError
from scheduling.core.triggers import TriggerError

BAD_OPTIONS = (
    HistoryError, TraceError, PolicyError, SizingError, CostFileError, TriggerError, ReplayOptionError, ValueError
)  # fmt: skip
Run = tuple[Report, SimulationResult]


class Command(BaseCommand):
    help = (
        "Simulates the fleet on a trace (CSV, gzip too; columns arrival_s, tenant, prompt_tokens, output_tokens and "
        "perhaps priority, max_tokens), or on the recorded requests of a model, and compares policies."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("trace", nargs="?", type=Path, help="the trace; without, --from-history gives the requests")
        add_fleet_arguments(parser)
        parser.add_argument("--cost", type=Path, help="cost file of the engine (a 7B model on one large GPU)")
        parser.add_argument("--save-cost", type=Path, metavar="FILE", help="write the cost that was used")
        parser.add_argument("--from-history", metavar="MODEL", help="learn the cost from what this model recorded")
        parser.add_argument("--rate", type=float, default=1.0, help="requests come so many times as fast (1)")
        parser.add_argument("--limit", type=int, help="only the first requests of a trace, or the latest of a history")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
        parser.add_argument("--chart", type=Path, metavar="FILE", help="write a page with charts (HTML)")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            _check(options)
            recorded = self._read_history(options)
            trace = self._read_trace(options, recorded)
            policies = read_policies(options, recorded)
            cost = _read_cost(options["cost"], recorded)
            settings = [read_settings(options, recorded, policy) for policy in policies]
        except BAD_OPTIONS as error:
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
        try:
            recorded = read_history(model, limit=options["limit"] if options["trace"] is None else None)
        except DatabaseError as error:
            raise HistoryError(f"The history cannot be read: {error}. `manage.py up` sets the database up.") from error
        error_ms = 1000 * recorded.typical_error_s
        self.stderr.write(
            f"Learned the cost of {model} from {recorded.served.steps:,} steps; off by {error_ms:.2f} ms a step."
        )
        return recorded

    def _read_trace(self, options: dict[str, Any], recorded: RecordedRun | None) -> Sequence[TraceRequest]:
        tenants = read_tenants(options)
        if options["trace"] is not None:
            trace = read_trace(options["trace"], rate=options["rate"], limit=options["limit"])
            return with_weights(trace, tenants)
        if recorded is None:
            raise TraceError("Name a trace, or a model with --from-history.")
        return with_weights([request.at_rate(options["rate"]) for request in recorded.trace], tenants)

    def _simulate(self, trace: Sequence[TraceRequest], settings: SimulationSettings, cost: StepCost) -> Run:
        name, total = settings.policy.name, len(trace)
        started = time.perf_counter()

        def show(num_ended: int) -> None:
            if sys.stderr.isatty() or num_ended == total:
                elapsed_s = time.perf_counter() - started
                self.stderr.write(
                    f"\r{name}: {num_ended:,} of {total:,} requests, {elapsed_s:.1f} s",
                    ending="\n" if num_ended == total else "",
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


def _check(options: dict[str, Any]) -> None:
    """What can be said before anything is read or runs. Raises ReplayOptionError."""
    if not 0 < options["rate"] < inf:
        raise ReplayOptionError(f"The rate must be a number above 0, not {options['rate']!r}.")
    if options["limit"] is not None and options["limit"] < 1:
        raise ReplayOptionError(f"The limit must be at least 1, not {options['limit']}.")
    chart = options["chart"]
    if chart is not None and chart.suffix.lower() not in (".html", ".htm"):
        raise ReplayOptionError(f"The chart is a page for a browser: name a file that ends in .html, not {chart.name}.")


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


def _read_cost(path: Path | None, recorded: RecordedRun | None) -> StepCost:
    if path is not None:
        return StepCost.load(path)
    return recorded.cost if recorded is not None else DEFAULT_COST
