"""What an engine's steps cost, learned from the seconds and requests that it recorded."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from heapq import heappop, heappush
from statistics import fmean, median

from inference.models import BatchRecord, RequestRecord
from scheduling.core.sizing.cost_model import DEFAULT_COST, StepCost, StepFeatures, StepTimeModel

GUESS_WEIGHT = 1e-5
"""Recorded seconds that a guess at the cost counts for."""
MIN_BUSY_SECONDS = 5
"""From fewer seconds of steps no cost is learned."""
MOST_CLAIMS = 32
"""A claim takes at most so many times as long as one of an engine that waits, even where others use its cores."""


class HistoryError(Exception):
    """The history does not suffice for a replay; the message says what is missing."""


@dataclass(slots=True)
class _Second:
    """What requests did in one second of one replica, as far as their records tell."""

    first_tokens: int = 0
    pairs: float = 0.0
    decodes: float = 0.0
    context: float = 0.0
    presence: float = 0.0
    """Share of the second in which at least one request was there."""


def learn_cost(
    requests: Sequence[RequestRecord], batches: Sequence[BatchRecord], *, prior: StepCost | None = None
) -> tuple[StepCost, float]:
    """The step cost behind recorded seconds, and its typical error per step. Raises HistoryError.

    It adds up to the time that all steps took, with all that lay between them. `prior` is what was known before, and
    holds where these seconds say little. A second's record says what its steps computed, how long they took, and what
    the engine had learned of their cost. Where it does not (an older engine wrote it), the requests' records give who
    decoded then, over which context, and what an engine needs between two steps is what was not a forward pass in
    seconds in which requests were there throughout.
    """
    if len(batches) < MIN_BUSY_SECONDS:
        raise HistoryError(f"Only {len(batches)} s of steps are recorded; at least {MIN_BUSY_SECONDS} are needed.")
    told = [batch for batch in batches if batch.busy_ms > 0]
    if len(told) >= MIN_BUSY_SECONDS:
        # Seconds of like load say little of what is what in them: the engine's own estimate, from single steps, knows
        # better, and where it tells none the proportions of other engines hold.
        own = _own_estimate(told)
        if own is not None:
            return _adding_up(own, told), _typical_error_s(own, told)
        guess = prior or _adding_up(DEFAULT_COST, told)
        model = StepTimeModel(guess, forgetting=0.9999, confidence=GUESS_WEIGHT if prior is None else 1.0)
        for batch in sorted(told, key=lambda batch: batch.second):
            model.observe(_features(batch), batch.busy_ms / 1000)
        return _adding_up(_mean_cost(model), told), model.typical_error_s
    model = StepTimeModel(prior, forgetting=0.9999, confidence=1e-6 if prior is None else 1.0)
    seconds = _by_second(requests)
    idle = _Second()
    for batch in sorted(batches, key=lambda batch: batch.second):
        did = seconds.get((batch.replica, int(batch.second.timestamp())), idle)
        decodes = max(0, min(round(did.decodes), batch.output_tokens))
        features = StepFeatures(batch.steps, batch.prompt_tokens, decodes, round(did.context), round(did.pairs))
        model.observe(features, batch.steps * batch.step_ms_mean / 1000)
    cost = _mean_cost(model)
    return replace(cost, step_s=cost.step_s + _overhead_s(batches, seconds)), model.typical_error_s


def learn_pace(cost: StepCost, batches: Iterable[BatchRecord], start: datetime) -> list[float]:
    """How many times as long as `cost` says steps took in each second from `start` on; 1 where nothing ran.

    What else a machine does slows its engine down for a while, and waits under load grow by a multiple of that. `start`
    is a whole second, as a record is: a slow second that is laid upon the work of the one before makes a queue that
    never was.
    """
    assert start.microsecond == 0
    took_s: dict[int, float] = defaultdict(float)
    expected_s: dict[int, float] = defaultdict(float)
    for batch in batches:
        second = round((batch.second - start).total_seconds())
        took_s[second] += batch.busy_ms / 1000
        expected_s[second] += cost.price(_features(batch))
    last = max(took_s, default=-1)
    return [took_s[second] / expected_s[second] if took_s[second] > 0 else 1.0 for second in range(last + 1)]


def learn_claim_s(requests: Iterable[RequestRecord], places: int) -> float:
    """Seconds from an arrival to its claim where an engine has room for it, on average.

    Told by requests that found fewer others there than the fleet has `places` (1 where a batch takes nobody in while it
    runs). An engine that computes takes longer to claim than one that waits for the bell; what took many times as long
    waited for something else, as for memory. Where none found nobody there, the least that was seen is the measure.
    """
    waits: list[float] = []
    unhurried: list[float] = []
    welcome: list[float] = []
    ends_s: list[float] = []
    """A heap: when those that are there will end."""
    for row in sorted(requests, key=lambda row: row.arrived_at):
        while ends_s and ends_s[0] <= row.arrived_at.timestamp():
            heappop(ends_s)
        if row.claimed_at is not None:
            wait_s = max(0.0, (row.claimed_at - row.arrived_at).total_seconds())
            if waits and not ends_s:
                unhurried.append(wait_s)
            if len(ends_s) < places:
                welcome.append(wait_s)
            waits.append(wait_s)
        heappush(ends_s, row.finished_at.timestamp())
    least_s = median(unhurried) if unhurried else min(waits, default=0.0)
    return fmean([wait_s for wait_s in welcome if wait_s <= MOST_CLAIMS * least_s] or [least_s])


def _features(batch: BatchRecord) -> StepFeatures:
    return StepFeatures(
        batch.steps, batch.prefill_tokens, batch.decode_sequences, batch.context_tokens, batch.attention_pairs
    )


def _own_estimate(batches: Iterable[BatchRecord]) -> StepCost | None:
    """What the engines had learned from their steps, on average over the latter half; None where they tell nothing."""
    names = [field.name for field in fields(StepCost)]
    told = [batch for batch in batches if len(batch.step_cost) == len(names)]
    told = sorted(told, key=lambda batch: batch.second)[len(told) // 2 :]
    steps = sum(batch.steps for batch in told)
    sums = [sum(batch.steps * batch.step_cost[i] for batch in told) for i in range(len(names))]
    try:
        return StepCost(**{name: value / steps for name, value in zip(names, sums, strict=True)}) if steps else None
    except (TypeError, ValueError) as error:
        raise HistoryError(f"The recorded step costs are not usable: {error}") from error


def _typical_error_s(cost: StepCost, batches: Sequence[BatchRecord]) -> float:
    """Mean error of a step's cost over seconds."""
    errors = [abs(cost.price(_features(batch)) - batch.busy_ms / 1000) / batch.steps for batch in batches]
    return sum(errors) / len(errors)


def _adding_up(cost: StepCost, batches: Iterable[BatchRecord]) -> StepCost:
    """The cost by which all steps together take as long as they did: hiccups are everybody's."""
    expected_s = sum(cost.price(_features(batch)) for batch in batches)
    factor = sum(batch.busy_ms for batch in batches) / 1000 / expected_s
    return StepCost(**{name: factor * value for name, value in asdict(cost).items()})


def _mean_cost(model: StepTimeModel) -> StepCost:
    try:
        return model.mean_cost
    except ValueError as error:
        raise HistoryError("The recorded steps took no time; no cost can be learned from them.") from error


def _overhead_s(batches: Iterable[BatchRecord], seconds: dict[tuple[str, int], _Second]) -> float:
    """Seconds between two steps of a busy engine; 0 where it never was busy for a whole second."""
    gaps = []
    for batch in batches:
        did = seconds.get((batch.replica, int(batch.second.timestamp())))
        if did is not None and did.presence >= 0.999:
            gaps.append((1 - batch.steps * batch.step_ms_mean / 1000) / batch.steps)
    return max(0.0, median(gaps)) if gaps else 0.0


def _by_second(requests: Iterable[RequestRecord]) -> dict[tuple[str, int], _Second]:
    """Spreads each request over the seconds it ran in."""
    seconds: dict[tuple[str, int], _Second] = defaultdict(_Second)
    for row in requests:
        if row.first_token_at is None:  # turned away, or begun by an engine that another took over from
            continue
        first_s, last_s = row.first_token_at.timestamp(), row.finished_at.timestamp()
        begin = seconds[row.replica, int(first_s)]
        begin.first_tokens += 1
        begin.pairs += row.prompt_tokens * (row.prompt_tokens + 1) / 2
        for second in range(int(first_s), int(last_s) + 1):
            did = seconds[row.replica, second]
            start_s, end_s = max(first_s, float(second)), min(last_s, second + 1.0)
            if end_s <= start_s:
                continue
            share = (end_s - start_s) / (last_s - first_s)
            tokens = share * (row.completion_tokens - 1)
            progress = ((start_s + end_s) / 2 - first_s) / (last_s - first_s)
            did.decodes += tokens
            did.context += tokens * (row.prompt_tokens + 1 + progress * (row.completion_tokens - 1))
    for replica, start_s, end_s in _busy_stretches(requests):
        for second in range(int(start_s), int(end_s) + 1):
            seconds[replica, second].presence += min(end_s, second + 1.0) - max(start_s, float(second))
    return seconds


def _busy_stretches(requests: Iterable[RequestRecord]) -> Iterator[tuple[str, float, float]]:
    """From when to when each replica had any request, as unix seconds."""
    stays = sorted(
        (row.replica, (row.claimed_at or row.first_token_at).timestamp(), row.finished_at.timestamp())
        for row in requests
        if row.first_token_at is not None
    )
    replica, start_s, end_s = "", 0.0, 0.0
    for name, from_s, to_s in stays:
        if name != replica or from_s > end_s:
            if end_s > start_s:
                yield replica, start_s, end_s
            replica, start_s, end_s = name, from_s, to_s
        end_s = max(end_s, to_s)
    if end_s > start_s:
        yield replica, start_s, end_s
