"""What a simulation showed: throughput, latency, SLA attainment, fairness; as values, and as a table."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scheduling.core.request import Priority
from scheduling.core.simulation.outcome import Outcome, ServiceTargets, SimulationResult

WINDOW_S = 10.0
"""Fairness is judged in windows of this length: long enough for many requests, short against a backlog."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a latency is spread, in seconds; all None where there was none."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    maximum: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Figures of some of the requests: all, a tenant's, or those of a priority."""

    requests: int
    finished: int
    refused: int
    output_tokens: int
    """Of finished requests."""
    ttft_s: Spread
    e2e_s: Spread
    wait_s: Spread
    """In the queue, until claimed."""
    sla_attainment: float
    """Share of all requests, refused ones too, that were answered within their targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One simulation in figures."""

    label: str
    total: Group
    tenants: dict[str, Group]
    priorities: dict[str, Group]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    tokens_per_s: float
    """Prompt and output tokens."""
    goodput_tokens_per_s: float
    """Output tokens of requests within their targets."""
    fairness: float | None
    """Jain's index of service: see `jain_of_service`."""
    preemptions: int
    steps: int
    utilization: float
    """Share of the replicas' time spent in forward passes."""
    mean_batch_size: float
    max_batch_size: int
    batch_sizes: dict[int, int]
    """Steps by the number of sequences in them."""
    size_changes: int
    policy_changes: list[tuple[float, str, str]]
    """When the adaptive policy switched, to which policy, and why."""
    refusals: dict[str, int]
    """Requests refused or dropped, by reason."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def build_report(label: str, result: SimulationResult, targets: ServiceTargets) -> Report:
    """Sum a simulation up."""
    outcomes = result.outcomes
    finished = [o for o in outcomes if o.state == "finished"]
    duration_s = max((o.finished_s or 0.0 for o in finished), default=0.0)
    output = sum(o.request.output_tokens for o in finished)
    prompt = sum(o.request.prompt_tokens for o in finished)
    good = sum(o.request.output_tokens for o in finished if o.meets(targets.of(o.request)))
    sequences = sum(size * steps for size, steps in result.batch_sizes.items())

    def rate(amount: float) -> float:
        return amount / duration_s if duration_s else 0.0

    return Report(
        label=label,
        total=_group(outcomes, targets),
        tenants=_groups(outcomes, targets, lambda o: o.request.tenant),
        priorities=_groups(outcomes, targets, lambda o: Priority(o.request.priority).name.lower()),
        duration_s=duration_s,
        requests_per_s=rate(len(finished)),
        output_tokens_per_s=rate(output),
        tokens_per_s=rate(prompt + output),
        goodput_tokens_per_s=rate(good),
        fairness=jain_of_service(outcomes),
        preemptions=result.preemptions,
        steps=result.steps,
        utilization=rate(result.busy_s) / result.num_replicas,
        mean_batch_size=sequences / result.steps if result.steps else 0.0,
        max_batch_size=max(result.batch_sizes, default=0),
        batch_sizes=dict(sorted(result.batch_sizes.items())),
        size_changes=len(result.size_changes),
        policy_changes=[(change.time_s, change.policy, change.reason) for change in result.policy_changes],
        refusals=dict(sorted(Counter(o.reason for o in outcomes if o.state == "refused").items())),
    )


def spread_of(values: Iterable[float | None]) -> Spread:
    """Mean and nearest-rank percentiles of those that are not None."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return Spread(mean=None, p50=None, p90=None, p99=None, maximum=None)

    def percentile(share: float) -> float:
        return known[max(0, math.ceil(share * len(known)) - 1)]

    mean = math.fsum(known) / len(known)
    return Spread(mean=mean, p50=percentile(0.5), p90=percentile(0.9), p99=percentile(0.99), maximum=known[-1])


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index (1984): 1 where all get the same, 1/n where one gets all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def jain_of_service(outcomes: Sequence[Outcome], window_s: float = WINDOW_S) -> float | None:
    """Jain's index of tenants' service as a share of their max-min fair service, on average over contended windows.

    In a window tenants want the tokens they are served in it and those of their requests that wait at its end. Divided
    fairly, what all were served gives everybody the same, and nobody more than wanted. A window is contended where
    somebody waits at its end and two tenants want something; None where none is. Prompt tokens are served between
    claim and first token, output tokens between first and last.
    """
    served: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    waiting: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for outcome in outcomes:
        request = outcome.request
        if outcome.claimed_s is None or outcome.first_token_s is None or outcome.finished_s is None:
            continue
        tokens = request.prompt_tokens + request.output_tokens
        for window in range(int(request.arrival_s // window_s), int(outcome.claimed_s // window_s)):
            waiting[window][request.tenant] += tokens
        for window, share in _windows(outcome.claimed_s, outcome.first_token_s, window_s):
            served[window][request.tenant] += share * request.prompt_tokens
        for window, share in _windows(outcome.first_token_s, outcome.finished_s, window_s):
            served[window][request.tenant] += share * request.output_tokens
    indices = []
    for window, waits in waiting.items():
        got = served[window]
        wanted = {tenant: got.get(tenant, 0.0) + waits.get(tenant, 0.0) for tenant in got.keys() | waits.keys()}
        if len(wanted) > 1 and any(got.values()):
            level = fair_level(list(wanted.values()), sum(got.values()))
            indices.append(jain([got.get(tenant, 0.0) / min(want, level) for tenant, want in wanted.items()]))
    return sum(indices) / len(indices) if indices else None


def fair_level(wanted: Sequence[float], available: float) -> float:
    """The most that anybody gets when `available` is divided max-min fairly, nobody getting more than wanted."""
    left = available
    for count, want in zip(range(len(wanted), 0, -1), sorted(wanted), strict=True):
        if want * count >= left:
            return left / count
        left -= want
    return max(wanted)


def _windows(start_s: float, end_s: float, window_s: float) -> Iterable[tuple[int, float]]:
    """The windows that a stretch of time touches, and the share of it that lies in each."""
    first, last = int(start_s // window_s), int(end_s // window_s)
    if first == last:
        yield first, 1.0
        return
    for window in range(first, last + 1):
        inside_s = min(end_s, (window + 1) * window_s) - max(start_s, window * window_s)
        yield window, inside_s / (end_s - start_s)


def _groups(outcomes: Sequence[Outcome], targets: ServiceTargets, key: Callable[[Outcome], str]) -> dict[str, Group]:
    parts: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        parts[key(outcome)].append(outcome)
    return {name: _group(part, targets) for name, part in sorted(parts.items())}


def _group(outcomes: Sequence[Outcome], targets: ServiceTargets) -> Group:
    finished = [o for o in outcomes if o.state == "finished"]
    num_met = sum(o.meets(targets.of(o.request)) for o in outcomes)
    return Group(
        requests=len(outcomes),
        finished=len(finished),
        refused=sum(o.state == "refused" for o in outcomes),
        output_tokens=sum(o.request.output_tokens for o in finished),
        ttft_s=spread_of(o.ttft_s for o in finished),
        e2e_s=spread_of(o.e2e_s for o in finished),
        wait_s=spread_of(o.wait_s for o in finished),
        sla_attainment=num_met / len(outcomes) if outcomes else 1.0,
    )


def light_half(report: Report) -> list[str]:
    """The half of the tenants who ask for the least output tokens and requests, lightest first."""
    tenants = sorted(
        report.tenants, key=lambda name: (report.tenants[name].output_tokens, report.tenants[name].requests)
    )
    return tenants[: len(tenants) // 2]
