"""Judges a rule by readings: pure functions, one for each kind, which also word what is wrong and what to do next."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dashboard.alerts.kinds import DAY_S, Rule
from dashboard.alerts.readings import Live, Readings, ReplicaNow, RequestSums

MIN_REQUESTS = 20
"""From fewer requests no share is judged: one miss of two is no burn of fifty."""
FULL_MEMORY = 0.9
BUDGET_S = 30 * DAY_S
"""The time that an error budget is for."""
WATCHED_STATES = ("ready", "paused", "draining", "lost")
"""A replica that starts has nothing to tell yet; one that stopped or failed has said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule's figure for a model, and a tenant or replica of it.

    `reason` says what is wrong and what to do next; where nothing is wrong, why not, if the figure does not show it.
    """

    model: str
    subject: str = ""
    value: float
    breached: bool
    reason: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.model, self.subject


def judge_rule(rule: Rule, readings: Readings) -> list[Finding] | None:
    """A finding for each subject whose figure is known; None where nothing can be said, since Redis is away."""
    found = JUDGES[rule.kind](rule, readings)
    return None if found is None else [finding for finding in found if rule.model in ("", finding.model)]


def _occupancy(rule: Rule, readings: Readings) -> Iterator[Finding] | None:
    return None if readings.live is None else _occupancies(rule, readings, readings.live)


def _occupancies(rule: Rule, readings: Readings, live: Live) -> Iterator[Finding]:
    used: dict[str, float] = defaultdict(float)
    slots: dict[str, float] = defaultdict(float)
    for (model, _replica), sums in readings.batches.get(rule.window_s, {}).items():
        used[model] += sums.sequence_steps
        slots[model] += sums.slot_steps
    for model, queue in live.queues.items():
        if not live.num_ready(model):
            continue  # the queue's own rule tells of it
        percent = 100 * used[model] / slots[model] if slots[model] else 0.0
        breached = queue.depth > 0 and rule.is_breached(percent)
        yield Finding(
            model=model,
            value=percent,
            breached=breached,
            reason=_say_occupancy(rule, model, percent, queue.depth, live) if breached else _calm(queue.depth),
        )


def _calm(depth: int) -> str:
    return "" if depth else "No request waits any more."


def _say_occupancy(rule: Rule, model: str, percent: float, depth: int, live: Live) -> str:
    wait = f"{depth:,} {'request waits' if depth == 1 else 'requests wait'}"
    mine = [replica for replica in live.replicas.values() if replica.model == model]
    paused = sum(replica.state in ("paused", "draining") for replica in mine)
    if any((replica.kv_usage or 0) >= FULL_MEMORY for replica in mine):
        advice = "The KV cache is full, so no more fit: give it more memory, or bound max_tokens."
    elif paused:
        advice = f"{paused} of {len(mine)} workers take no requests: resume them on Fleet."
    else:
        advice = "Look on Fleet at batch size, sizing strategy and triggers: one of them keeps batches small."
    return f"Batches were {percent:.0f} % full over the last {span(rule.window_s)} while {wait}. {advice}"


def _queue(rule: Rule, readings: Readings) -> Iterator[Finding] | None:
    return None if readings.live is None else _queues(rule, readings.live)


def _queues(rule: Rule, live: Live) -> Iterator[Finding]:
    for model, queue in live.queues.items():
        ready = live.num_ready(model)
        each = queue.depth / max(1, ready)
        if ready:
            workers = "1 ready worker" if ready == 1 else f"{ready} ready workers, {each:,.0f} each"
            advice = "Add replicas on Fleet, or see on Live whose requests they are."
        else:
            workers = "no ready worker"
            advice = "Start, resume or repair a worker on Fleet."
        reason = f"{queue.depth:,} requests wait for {workers}. {advice}"
        yield _plainly(rule, model, "", each, reason)


def _ready_workers(rule: Rule, readings: Readings) -> Iterator[Finding] | None:
    return None if readings.live is None else _workers(rule, readings.live)


def _workers(rule: Rule, live: Live) -> Iterator[Finding]:
    for model in live.queues:
        ready = live.num_ready(model)
        states = Counter(replica.state for replica in live.replicas.values() if replica.model == model)
        others = ", ".join(f"{num} {state}" for state, num in sorted(states.items()) if state != "ready")
        have = f"{ready or 'no'} ready {'worker' if ready == 1 else 'workers'}{f' ({others})' if others else ''}"
        reason = f"{model} is offered and has {have}. Start, resume or repair one on Fleet, or withdraw the model."
        yield _plainly(rule, model, "", ready, reason)


def _refusals(rule: Rule, readings: Readings) -> Iterator[Finding]:
    refused: dict[str, int] = defaultdict(int)
    ended: dict[str, int] = defaultdict(int)
    for (model, _tenant), sums in readings.requests.get(rule.window_s, {}).items():
        refused[model] += sums.refused
        ended[model] += sums.finished + sums.failed
    for model, lost in refused.items():
        num = ended[model] + lost
        if num >= MIN_REQUESTS:
            percent = 100 * lost / num
            reason = (
                f"{lost:,} of {num:,} requests of the last {span(rule.window_s)} were refused for want of capacity: no "
                "worker, overload or a full queue. See on Tenants which, and on Fleet what is missing."
            )
            yield _plainly(rule, model, "", percent, reason)


def _step_time(rule: Rule, readings: Readings) -> Iterator[Finding]:
    times: dict[str, float] = defaultdict(float)
    steps: dict[str, int] = defaultdict(int)
    for (model, _replica), sums in readings.batches.get(rule.window_s, {}).items():
        times[model] += sums.step_ms
        steps[model] += sums.steps
    for model, num in steps.items():
        if num:
            mean = times[model] / num
            reason = (
                f"A step took {mean:,.0f} ms on average over the last {span(rule.window_s)}; the target is "
                f"{rule.threshold:g} ms. Make batches smaller on Fleet, or see there whether a device is throttled."
            )
            yield _plainly(rule, model, "", mean, reason)


def _completion(rule: Rule, readings: Readings) -> Iterator[Finding]:
    finished: dict[str, int] = defaultdict(int)
    failed: dict[str, int] = defaultdict(int)
    for (model, _tenant), sums in readings.requests.get(rule.window_s, {}).items():
        finished[model] += sums.finished
        failed[model] += sums.failed
    for model, lost in failed.items():
        num = finished[model] + lost
        if num >= MIN_REQUESTS:
            percent = 100 * finished[model] / num
            reason = (
                f"{percent:.1f} % of {num:,} requests that ended in the last {span(rule.window_s)} were answered; "
                f"{lost:,} failed. Filter Requests by the state failed: their codes say why."
            )
            yield _plainly(rule, model, "", percent, reason)


def _sla_burn(rule: Rule, readings: Readings) -> Iterator[Finding]:
    """Multi-window burn rates: Beyer et al., The Site Reliability Workbook (2018), chapter 5."""
    short = readings.requests.get(rule.short_window_s, {})
    for key, sums in readings.requests.get(rule.window_s, {}).items():
        rate = burn_rate(sums)
        if rate is None or sums.judged < MIN_REQUESTS:
            continue
        now = burn_rate(short[key]) if key in short else None
        breached = rule.is_breached(rate) and now is not None and rule.is_breached(now)
        model, tenant = key
        if breached and now is not None:
            reason = _say_burn(rule, tenant, rate, now, sums)
        else:
            reason = f"Spent {now or 0:.1f} times as fast as allowed over the last {span(rule.short_window_s)}."
        yield Finding(model=model, subject=tenant, value=rate, breached=breached, reason=reason)


def burn_rate(sums: RequestSums) -> float | None:
    """How many times faster than allowed an error budget is spent; None where nothing was judged."""
    return (sums.judged - sums.met) / sums.allowed if sums.allowed > 0 else None


def _say_burn(rule: Rule, tenant: str, rate: float, now: float, sums: RequestSums) -> str:
    return (
        f"{tenant} missed its SLA with {sums.judged - sums.met:,} of {sums.judged:,} requests in the last "
        f"{span(rule.window_s)}: its error budget is spent {rate:.1f} times faster than allowed ({now:.1f} times over "
        f"the last {span(rule.short_window_s)}), and 30 days of it last {span(int(BUDGET_S / rate))}. See on Tenants "
        "what it gets, and on Policies by What-if which policy would have served it better."
    )


def _telemetry(rule: Rule, readings: Readings) -> Iterator[Finding] | None:
    return None if readings.live is None else _silences(rule, readings.live)


def _silences(rule: Rule, live: Live) -> Iterator[Finding]:
    for name, replica in live.replicas.items():
        if replica.state not in WATCHED_STATES:
            continue
        if replica.state == "lost":
            advice = "Its requests went to other workers: look at its host and its log."
        else:
            advice = "Requests run on, but nothing is known of the device: look at its driver."
        reason = f"{replica.why_silent} That is {span(int(replica.silent_s))} ago. {advice}"
        yield _plainly(rule, replica.model, name, replica.silent_s, reason)


def _throttling(rule: Rule, readings: Readings) -> Iterator[Finding]:
    replicas: Mapping[str, ReplicaNow] = readings.live.replicas if readings.live else {}
    for (model, name), sums in readings.batches.get(rule.window_s, {}).items():
        percent = 100 * sums.throttled / sums.seconds if sums.seconds else 0.0
        now = ", ".join(replicas[name].throttle_reasons) if name in replicas else ""
        reason = (
            f"The device held its clocks down for {percent:.0f} % of the last {span(rule.window_s)}"
            f"{f' (now: {now})' if now else ''}. Look at its cooling and its power; Drain takes it out of service."
        )
        yield _plainly(rule, model, name, percent, reason)


JUDGES: Mapping[str, Callable[[Rule, Readings], Iterator[Finding] | None]] = {
    "occupancy": _occupancy,
    "queue": _queue,
    "ready_workers": _ready_workers,
    "refusals": _refusals,
    "step_time": _step_time,
    "completion": _completion,
    "sla_burn": _sla_burn,
    "telemetry": _telemetry,
    "throttling": _throttling,
}


def _plainly(rule: Rule, model: str, subject: str, value: float, reason: str) -> Finding:
    """A finding whose value alone says whether the rule is breached."""
    breached = rule.is_breached(value)
    return Finding(model=model, subject=subject, value=value, breached=breached, reason=reason if breached else "")


def span(seconds: int) -> str:
    """Whole seconds as people say them, in the largest unit that fits."""
    for size, unit in ((DAY_S, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (seconds >= size and seconds % size == 0):
            return f"{seconds / size:.0f} {'day' if unit == 'days' and seconds < 2 * size else unit}"
    return f"{seconds} s"
