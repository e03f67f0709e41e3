"""Recorded history as input of the simulator: what was asked, how it was served, and what the engine's steps cost."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, get_args

from inference.models import BatchRecord, ModelDeployment, RequestRecord
from inference.recorded_cost import HistoryError, learn_claim_s, learn_cost, learn_pace
from scheduling.core.answers import DropReason
from scheduling.core.planner import Mode
from scheduling.core.simulation.outcome import Outcome, ServiceTarget, ServiceTargets, SimulationResult
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import StepCost
from scheduling.models import PolicyRevision, Tenant
from scheduling.selectors import find_service_levels

MAX_REQUESTS = 500_000
LONGEST = timedelta(days=1)
"""A request of a window that ended later than this after it is not found."""
TURNED_AWAY = frozenset(get_args(DropReason))
"""Error codes of requests that waited and were never served: a replay asks what would have become of them."""
BUCKET_S = 10
"""Replicas that took steps within so many seconds were there at the same time."""

__all__ = ["HistoryError", "RecordedRun", "as_result", "read_history", "read_window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """What a model served in some stretch of time."""

    model: str
    start: datetime
    """The whole second of the first arrival: second 0 of the times in `served`."""
    served: SimulationResult
    """The requests with their real times, from `start` on, in the form that a simulation gives."""
    num_assumed: int
    """Of these requests, those that were turned away before their first token: their length is a guess."""
    cost: StepCost
    typical_error_s: float
    """Of the cost, per step."""
    num_replicas: int
    num_blocks: int
    policy: str
    params: Mapping[str, Any]
    """Of the policy that was in force for most of the requests."""
    mode: Mode
    batch_size: int
    step_tokens: int
    long_prefill_threshold: int
    prefix_cache: bool
    triggers: Mapping[str, Any]
    """What started the batches of `dynamic` and `static`, see `parse_trigger`."""
    claim_s: float
    """From an arrival to its claim by an engine that waited for it."""
    pace: Sequence[float]
    """How many times as long as `cost` says steps took, by second from `start` on."""
    targets: ServiceTargets
    """As they are now."""

    @property
    def trace(self) -> list[TraceRequest]:
        return [outcome.request for outcome in self.served.outcomes]


def read_history(model: str, *, limit: int | None = None) -> RecordedRun:
    """The latest requests of a model, at most `limit`, and what its replicas recorded meanwhile.

    Raises HistoryError.
    """
    rows = RequestRecord.objects.filter(model=model).defer("timeline").order_by("-finished_at", "-id")
    return _read(model, list(rows[: min(limit or MAX_REQUESTS, MAX_REQUESTS)]))


def read_window(model: str, *, start: datetime, end: datetime) -> RecordedRun:
    """The requests of a model that arrived from `start` to before `end`. Raises HistoryError."""
    # Selected by the end, which is indexed, then by the arrival.
    rows = RequestRecord.objects.filter(
        model=model, finished_at__gte=start, finished_at__lt=end + LONGEST, arrived_at__gte=start, arrived_at__lt=end
    )
    return _read(model, list(rows.defer("timeline").order_by("-finished_at", "-id")[:MAX_REQUESTS]))


def _read(model: str, found: list[RequestRecord]) -> RecordedRun:
    rows = sorted((row for row in found if _counts(row)), key=lambda row: (row.arrived_at, row.id))
    if not any(row.completion_tokens for row in rows):
        known = sorted(set(RequestRecord.objects.order_by("model").values_list("model", flat=True).distinct()))
        raise HistoryError(f"No request of {model!r} is recorded; there are records of: {', '.join(known) or 'none'}.")
    start, end = rows[0].arrived_at.replace(microsecond=0), max(row.finished_at for row in rows)
    batches = list(BatchRecord.objects.filter(model=model, second__gte=start, second__lte=end, steps__gte=1))
    cost, error_s = learn_cost(rows, batches)
    num_blocks = max(batch.kv_blocks_total for batch in batches)
    if not num_blocks:
        raise HistoryError(f"The steps of {model!r} are another server's: nothing is known to replay them by.")
    policy, revision = Counter((row.policy or "fifo", row.policy_revision) for row in rows).most_common(1)[0][0]
    deployment = ModelDeployment.objects.filter(name=model).first()
    num_replicas, batch_size = _count_replicas(batches), _read_batch_size(deployment, batches)
    mode: Mode = Counter(batch.mode for batch in batches).most_common(1)[0][0]  # type: ignore[assignment]
    return RecordedRun(
        model=model,
        start=start,
        served=as_result(rows, batches, _read_tenants(), start),
        num_assumed=sum(not row.completion_tokens for row in rows),
        cost=cost,
        typical_error_s=error_s,
        num_replicas=num_replicas,
        num_blocks=num_blocks,
        claim_s=learn_claim_s(rows, num_replicas * batch_size if mode == "continuous" else 1),
        pace=learn_pace(cost, batches, start),
        policy=policy,
        params=_read_params(model, revision, policy),
        mode=mode,
        batch_size=batch_size,
        step_tokens=deployment.step_tokens if deployment else 2048,
        long_prefill_threshold=deployment.long_prefill_threshold if deployment else 0,
        prefix_cache=deployment is None or deployment.prefix_cache != "off",
        triggers=deployment.triggers if deployment else {},
        targets=read_targets(),
    )


def read_targets() -> ServiceTargets:
    """The targets of all service levels that are set."""
    targets = {
        key: ServiceTarget(
            ttft_s=None if level.ttft_ms is None else level.ttft_ms / 1000,
            e2e_s=None if level.e2e_ms is None else level.e2e_ms / 1000,
            tpot_s=None if level.tpot_ms is None else level.tpot_ms / 1000,
        )
        for key, level in find_service_levels().items()
    }
    return ServiceTargets(
        by_priority={priority: target for (tenant, priority), target in targets.items() if not tenant},
        by_tenant={key: target for key, target in targets.items() if key[0]},
    )


def _counts(row: RequestRecord) -> bool:
    """Whether it was served, or wanted to be until it was turned away."""
    return row.completion_tokens > 0 or (row.state == "failed" and row.error_code in TURNED_AWAY)


def _read_params(model: str, revision: int, policy: str) -> Mapping[str, Any]:
    row = PolicyRevision.objects.filter(model=model, revision=revision, name=policy).first()
    return {} if row is None else row.params


def _read_batch_size(deployment: ModelDeployment | None, batches: Sequence[BatchRecord]) -> int:
    """The size that was in force for most of the seconds; of older records, the deployment's or the largest seen."""
    sizes = Counter(batch.max_batch_size for batch in batches if batch.max_batch_size)
    if sizes:
        return sizes.most_common(1)[0][0]
    return deployment.max_batch_size if deployment else max(batch.batch_size_max for batch in batches)


def _count_replicas(batches: Sequence[BatchRecord]) -> int:
    """The most that were there at a time; one that followed another counts as the same."""
    there: dict[int, set[str]] = defaultdict(set)
    for batch in batches:
        there[int(batch.second.timestamp()) // BUCKET_S].add(batch.replica)
    return max(len(names) for names in there.values())


def _read_tenants() -> dict[str, tuple[float, bool]]:
    rows = Tenant.objects.values_list("name", "weight", "drop_expired")
    return {name: (weight, drops) for name, weight, drops in rows}


def as_result(
    rows: Sequence[RequestRecord],
    batches: Sequence[BatchRecord],
    tenants: Mapping[str, tuple[float, bool]],
    start: datetime,
) -> SimulationResult:
    """What was served, in the form of a simulation, so that both are reported alike.

    `rows` are in the order of their arrival; `tenants` gives weights, and who drops what is past its deadline. Times
    are told from `start` on.
    """
    start_s = start.timestamp()
    replicas = {name: index for index, name in enumerate(sorted({batch.replica for batch in batches}))}
    guess = _guess_lengths(rows)
    sizes: Counter[int] = Counter()
    for batch in batches:
        sizes[round(batch.batch_size_mean)] += batch.steps
    return SimulationResult(
        outcomes=[_outcome(row, start_s, tenants, replicas, guess) for row in rows],
        end_s=max(row.finished_at.timestamp() for row in rows) - start_s,
        steps=sum(batch.steps for batch in batches),
        busy_s=sum(batch.steps * batch.step_ms_mean / 1000 for batch in batches),
        preemptions=sum(batch.preemptions for batch in batches),
        batch_sizes=sizes,
        size_changes=[],
        num_replicas=_count_replicas(batches),
    )


def _outcome(
    row: RequestRecord,
    start_s: float,
    tenants: Mapping[str, tuple[float, bool]],
    replicas: Mapping[str, int],
    guess: Mapping[str, float],
) -> Outcome:
    def since(moment: datetime | None) -> float | None:
        return None if moment is None else moment.timestamp() - start_s

    output = row.completion_tokens or max(1, round(row.max_tokens * guess.get(row.tenant, guess[""])))
    request = TraceRequest(
        row.arrived_at.timestamp() - start_s,
        row.tenant,
        max(1, row.prompt_tokens),
        output,
        row.priority,
        max(row.max_tokens, output),
        since(row.deadline_at),
        *tenants.get(row.tenant, (1.0, False)),
    )
    if not row.completion_tokens:
        return Outcome(request, "refused", row.error_code)
    outcome = Outcome(request, "finished", "", replicas.get(row.replica, -1))
    outcome.claimed_s, outcome.first_token_s = since(row.claimed_at), since(row.first_token_at)
    outcome.finished_s = row.finished_at.timestamp() - start_s
    return outcome


def _guess_lengths(rows: Sequence[RequestRecord]) -> dict[str, float]:
    """What share of `max_tokens` answers take, by tenant and ("") over all: for requests that got none."""
    made: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for row in rows:
        if row.completion_tokens:
            for name in (row.tenant, ""):
                made[name] += row.completion_tokens
                asked[name] += max(row.max_tokens, row.completion_tokens)
    return {name: made[name] / asked[name] for name in made}
