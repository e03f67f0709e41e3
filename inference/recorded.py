"""Recorded history as input of the simulator: what was asked, how it was served, and what the engine's steps cost."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from inference.models import BatchRecord, ModelDeployment, RequestRecord
from scheduling.core.simulation.outcome import Outcome, SimulationResult
from scheduling.core.simulation.trace import TraceRequest
from scheduling.core.sizing.cost_model import StepCost, StepFeatures, StepTimeModel

MIN_BUSY_SECONDS = 5
"""From fewer seconds of steps no cost is learned."""
MAX_REQUESTS = 500_000


class HistoryError(Exception):
    """The history does not suffice for a replay; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """What a model served lately."""

    served: SimulationResult
    """The requests with their real times, from the first arrival on, in the form that a simulation gives."""
    cost: StepCost
    typical_error_s: float
    """Of the cost, per step."""
    num_replicas: int
    num_blocks: int
    policy: str
    mode: str
    batch_size: int
    step_tokens: int

    @property
    def trace(self) -> list[TraceRequest]:
        return [outcome.request for outcome in self.served.outcomes]


@dataclass(slots=True)
class _Second:
    """What requests did in one second of one replica, as far as their records tell."""

    first_tokens: int = 0
    pairs: float = 0.0
    decodes: float = 0.0
    context: float = 0.0
    presence: float = 0.0
    """Share of the second in which at least one request was there (its records may add up to more than 1)."""


def read_history(model: str, *, limit: int | None = None) -> RecordedRun:
    """The latest requests of a model, at most `limit`, and what its replicas recorded meanwhile.

    Raises HistoryError.
    """
    rows = RequestRecord.objects.filter(model=model, completion_tokens__gte=1, first_token_at__isnull=False)
    latest = list(rows.order_by("-arrived_at", "-id")[: min(limit or MAX_REQUESTS, MAX_REQUESTS)])[::-1]
    if not latest:
        known = sorted(set(RequestRecord.objects.order_by("model").values_list("model", flat=True).distinct()))
        raise HistoryError(f"No request of {model!r} is recorded; there are records of: {', '.join(known) or 'none'}.")
    start_s, end_s = latest[0].arrived_at.replace(microsecond=0), max(row.finished_at for row in latest)
    batches = list(BatchRecord.objects.filter(model=model, second__gte=start_s, second__lte=end_s, steps__gte=1))
    cost, error_s = learn_cost(latest, batches)
    deployment = ModelDeployment.objects.filter(name=model).first()
    return RecordedRun(
        served=_as_result(latest, batches),
        cost=cost,
        typical_error_s=error_s,
        num_replicas=len({batch.replica for batch in batches}),
        num_blocks=max(batch.kv_blocks_total for batch in batches),
        policy=Counter(row.policy or "fifo" for row in latest).most_common(1)[0][0],
        mode=Counter(batch.mode for batch in batches).most_common(1)[0][0],
        batch_size=deployment.max_batch_size if deployment else max(batch.batch_size_max for batch in batches),
        step_tokens=deployment.step_tokens if deployment else 2048,
    )


def learn_cost(requests: Sequence[RequestRecord], batches: Sequence[BatchRecord]) -> tuple[StepCost, float]:
    """The step cost behind recorded seconds, and its typical error per step. Raises HistoryError.

    A second's record gives its steps, their time and prompt tokens; the requests' records give who decoded then, over
    which context. What an engine needs between two steps is added to the fixed part: in seconds in which requests were
    there throughout, all that was not a forward pass.
    """
    if len(batches) < MIN_BUSY_SECONDS:
        raise HistoryError(f"Only {len(batches)} s of steps are recorded; at least {MIN_BUSY_SECONDS} are needed.")
    seconds = _by_second(requests)
    model = StepTimeModel(forgetting=0.9999)
    idle = _Second()
    for batch in sorted(batches, key=lambda batch: batch.second):
        did = seconds.get((batch.replica, int(batch.second.timestamp())), idle)
        decodes = max(0, min(round(did.decodes), batch.output_tokens))
        features = StepFeatures(batch.steps, batch.prompt_tokens, decodes, round(did.context), round(did.pairs))
        model.observe(features, batch.steps * batch.step_ms_mean / 1000)
    try:
        cost = model.mean_cost
    except ValueError as error:
        raise HistoryError("The recorded steps took no time; no cost can be learned from them.") from error
    return replace(cost, step_s=cost.step_s + _overhead_s(batches, seconds)), model.typical_error_s


def _overhead_s(batches: Iterable[BatchRecord], seconds: dict[tuple[str, int], _Second]) -> float:
    """Seconds between two steps of a busy engine; 0 where it never was busy for a whole second."""
    gaps = []
    for batch in batches:
        did = seconds.get((batch.replica, int(batch.second.timestamp())))
        if did is not None and did.presence >= 1:
            gaps.append((1 - batch.steps * batch.step_ms_mean / 1000) / batch.steps)
    return max(0.0, median(gaps)) if gaps else 0.0


def _by_second(requests: Iterable[RequestRecord]) -> dict[tuple[str, int], _Second]:
    """Spreads each request over the seconds it ran in."""
    seconds: dict[tuple[str, int], _Second] = defaultdict(_Second)
    for row in requests:
        assert row.first_token_at is not None
        first_s, last_s = row.first_token_at.timestamp(), row.finished_at.timestamp()
        begin = seconds[row.replica, int(first_s)]
        begin.first_tokens += 1
        begin.pairs += row.prompt_tokens * (row.prompt_tokens + 1) / 2
        claimed_s = row.claimed_at.timestamp() if row.claimed_at else first_s
        for second in range(int(claimed_s), int(last_s) + 1):
            did = seconds[row.replica, second]
            inside_s = min(last_s, second + 1.0) - max(claimed_s, float(second))
            did.presence = max(did.presence, inside_s)
            start_s, end_s = max(first_s, float(second)), min(last_s, second + 1.0)
            if end_s <= start_s:
                continue
            share = (end_s - start_s) / (last_s - first_s)
            tokens = share * (row.completion_tokens - 1)
            progress = ((start_s + end_s) / 2 - first_s) / (last_s - first_s)
            did.decodes += tokens
            did.context += tokens * (row.prompt_tokens + 1 + progress * (row.completion_tokens - 1))
    return seconds


def _as_result(rows: Sequence[RequestRecord], batches: Sequence[BatchRecord]) -> SimulationResult:
    """What was served, in the form of a simulation, so that both are reported alike."""
    start_s = rows[0].arrived_at.timestamp()
    replicas = {name: index for index, name in enumerate(sorted({batch.replica for batch in batches}))}
    sizes: Counter[int] = Counter()
    for batch in batches:
        sizes[round(batch.batch_size_mean)] += batch.steps
    outcomes = []
    for row in rows:
        request = TraceRequest(
            row.arrived_at.timestamp() - start_s,
            row.tenant,
            max(1, row.prompt_tokens),
            row.completion_tokens,
            row.priority,
            max(row.max_tokens, row.completion_tokens),
        )
        outcome = Outcome(request, "finished", "", replicas.get(row.replica, -1))
        outcome.claimed_s = row.claimed_at.timestamp() - start_s if row.claimed_at else None
        outcome.first_token_s = row.first_token_at.timestamp() - start_s if row.first_token_at else None
        outcome.finished_s = row.finished_at.timestamp() - start_s
        outcomes.append(outcome)
    return SimulationResult(
        outcomes=outcomes,
        end_s=max(outcome.finished_s or 0.0 for outcome in outcomes),
        steps=sum(batch.steps for batch in batches),
        busy_s=sum(batch.steps * batch.step_ms_mean / 1000 for batch in batches),
        preemptions=sum(batch.preemptions for batch in batches),
        batch_sizes=sizes,
        size_changes=[],
        num_replicas=max(1, len(replicas)),
    )
