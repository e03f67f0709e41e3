"""What other policies would have done with recorded traffic, beside what really happened: for pages and tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.recorded import RecordedRun
from scheduling.core.policies import build_policy
from scheduling.core.policy import Policy
from scheduling.core.simulation.report import Group, Report, build_report
from scheduling.core.simulation.simulator import SimulationSettings, simulate
from scheduling.core.sizing.cost_model import StepCost
from scheduling.core.triggers import parse_trigger

Progress = Callable[[float, str], None]
"""Told the share that is done (0 to 1) and the candidate under way, a few times a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A policy to try, with the parameters that differ from its defaults."""

    policy: str
    params: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """What it is called in the comparison; its policy's name where empty."""


def run_what_if(
    recorded: RecordedRun,
    candidates: Sequence[Candidate],
    cost: StepCost | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Replay recorded traffic under each candidate, and under the policy that was really in force.

    `recorded` comes from `read_window` or `read_history`; `cost` stands in for what was learned from it. The answer is
    made of JSON's types (see `docs/simulator.md`): `really` is the record, `replayed` the simulation of the policy that
    was in force, with its error against the record, which says how far to trust the others; `candidates` are in the
    order given. Raises PolicyError before anything runs, and whatever `progress` raises, which ends the run.
    """
    tried = [_Trial(one.label or one.policy, build_policy(one.policy, one.params)) for one in candidates]
    in_force = build_policy(recorded.policy, recorded.params)
    base = next((trial for trial in tried if trial.policy == in_force), None)
    trials = tried if base is not None else [_Trial(in_force.name, in_force), *tried]
    reports = [
        _replay(
            recorded,
            trial,
            cost or recorded.cost,
            _part_of(progress, number, len(trials), len(recorded.served.outcomes), trial.label),
        )
        for number, trial in enumerate(trials)
    ]
    really = build_report(f"recorded ({recorded.policy})", recorded.served, recorded.targets)
    replayed = reports[trials.index(base) if base is not None else 0]
    return {
        "model": recorded.model,
        "start": recorded.start.isoformat(),
        "requests": len(recorded.served.outcomes),
        "assumed": recorded.num_assumed,
        "typical_error_ms": 1000 * recorded.typical_error_s,
        "fleet": {
            "replicas": recorded.num_replicas,
            "mode": recorded.mode,
            "batch_size": recorded.batch_size,
            "kv_blocks": recorded.num_blocks,
            "step_tokens": recorded.step_tokens,
        },
        "really": _figures(really),
        "replayed": {**_figures(replayed), "error": _errors(really.total, replayed.total)},
        "candidates": [
            {**_figures(report), "policy": trial.policy.name, "params": dict(trial.policy.params)}
            for trial, report in zip(trials, reports, strict=True)
            if trial in tried
        ],
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    label: str
    policy: Policy


def settings_for(recorded: RecordedRun, policy: Policy) -> SimulationSettings:
    """The fleet that was recorded, under a policy."""
    return SimulationSettings(
        policy=policy,
        num_replicas=recorded.num_replicas,
        mode=recorded.mode,
        batch_size=recorded.batch_size,
        step_tokens=recorded.step_tokens,
        num_blocks=recorded.num_blocks,
        long_prefill_threshold=recorded.long_prefill_threshold,
        prefix_cache=recorded.prefix_cache,
        trigger=parse_trigger(recorded.triggers),
        claim_s=recorded.claim_s,
        pace=recorded.pace,
        targets=recorded.targets,
    )


def _replay(recorded: RecordedRun, trial: _Trial, cost: StepCost, progress: Callable[[int], None]) -> Report:
    settings = settings_for(recorded, trial.policy)
    return build_report(trial.label, simulate(recorded.trace, settings, cost, progress=progress), recorded.targets)


def _part_of(
    progress: Progress | None, number: int, total: int, num_requests: int, label: str
) -> Callable[[int], None]:
    """What one of several runs tells of its own progress, as a share of the whole."""

    def tell(num_ended: int) -> None:
        if progress is not None:
            progress((number + num_ended / num_requests) / total, label)

    return tell


def _figures(report: Report) -> dict[str, Any]:
    """A report in JSON's types."""
    figures = report.to_dict()
    figures["batch_sizes"] = {str(size): steps for size, steps in report.batch_sizes.items()}
    figures["policy_changes"] = [list(change) for change in report.policy_changes]
    return figures


def _errors(really: Group, replayed: Group) -> dict[str, float | None]:
    """By how much the replay is off, as a share of what really was; None where that is unknown."""
    return {
        f"{name}_{figure}": _error(getattr(getattr(really, name), figure), getattr(getattr(replayed, name), figure))
        for name in ("ttft_s", "e2e_s")
        for figure in ("mean", "p99")
    }


def _error(real: float | None, predicted: float | None) -> float | None:
    return predicted / real - 1 if real and predicted is not None else None
