"""Guarded switches: a policy is turned to under a watch, and turned back by itself where a figure gets worse."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone
from redis.exceptions import RedisError

from dashboard.models import GuardedSwitch
from dashboard.overdue import Wait, allowed_if_late, read_waits
from dashboard.rollups import judge
from inference.models import RequestRecord
from scheduling.connection import live_keys, live_redis
from scheduling.core.policies import PolicyError
from scheduling.fleet import FleetQueue
from scheduling.models import PolicyRevision
from scheduling.policy_switch import Announce, newest_revisions, switch_policy
from scheduling.selectors import find_service_levels
from scheduling.store import TIME, execute_many
from scheduling.switch import StaleRevision

logger = logging.getLogger(__name__)

ACTOR = "guard"
MIN_REQUESTS = 20
"""From fewer requests that ended since the switch nothing is judged, but by those that still wait."""
MAX_ROWS = 5000
MIN_WATCH_S, MAX_WATCH_S = 5, 86_400
State = GuardedSwitch.State
Figures = Mapping[str, float | int | None]
Weighted = Sequence[tuple[float, float]]
"""Seconds, and how many requests they stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardMetric:
    """What a guard watches. `falls`: lower is worse."""

    title: str
    unit: str
    falls: bool
    default: float


METRICS: Mapping[str, GuardMetric] = {
    "attainment": GuardMetric(title="Within the SLA", unit="%", falls=True, default=95.0),
    "ttft_p99_s": GuardMetric(title="TTFT, p99", unit="s", falls=False, default=5.0),
    "e2e_p99_s": GuardMetric(title="End to end, p99", unit="s", falls=False, default=30.0),
    "queue_p99_s": GuardMetric(title="Queue time, p99", unit="s", falls=False, default=5.0),
    "failed": GuardMetric(title="Failed", unit="%", falls=False, default=5.0),
    "oldest_wait_s": GuardMetric(title="Longest wait since the change", unit="s", falls=False, default=60.0),
}


COUNTS = {"requests": "Requests that ended", "waiting": "Requests that wait", "judged": "Judged by a service level"}


class GuardError(ValueError):
    """The guard cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A figure, the worst it may be, and for how long it is watched."""

    metric: str
    threshold: float
    watch_s: int

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise GuardError(f"metric must be one of {', '.join(METRICS)}.")
        if not 0 <= self.threshold <= 1e6:
            raise GuardError("threshold must be a number from 0 to 1,000,000.")
        if not MIN_WATCH_S <= self.watch_s <= MAX_WATCH_S:
            raise GuardError(f"watch_s must be a whole number from {MIN_WATCH_S} to {MAX_WATCH_S:,}.")


def switch_under_guard(guard: Guard, **order: Any) -> tuple[PolicyRevision, GuardedSwitch]:
    """`switch_policy` under a guard, which is written with the revision: no switch goes unwatched. Raises as that."""
    watches: list[GuardedSwitch] = []
    revision = switch_policy(**order, on_written=lambda revision: watches.append(_watch(revision, guard)))
    (watched,) = watches
    _renumber(watched, revision)
    if revision.applied_at is not None:
        _begin(watched, revision.applied_at)
    return revision, watched


def _watch(revision: PolicyRevision, guard: Guard) -> GuardedSwitch:
    started, span = revision.created_at, timedelta(seconds=guard.watch_s)
    return GuardedSwitch.objects.create(
        model=revision.model,
        revision=revision.revision,
        row=revision,
        metric=guard.metric,
        threshold=guard.threshold,
        watch_s=guard.watch_s,
        started_at=started,
        ends_at=started + span,
        before=dict(read_figures(revision.model, started - span, started)),
    )


def _begin(guard: GuardedSwitch, when: datetime) -> None:
    """Watch from then on, for the whole time."""
    guard.started_at, guard.ends_at = when, when + timedelta(seconds=guard.watch_s)
    GuardedSwitch.objects.filter(pk=guard.pk, state=State.WATCHING).update(
        started_at=guard.started_at, ends_at=guard.ends_at
    )


def _renumber(guard: GuardedSwitch, revision: PolicyRevision) -> None:
    """Follow a revision that got another number when it came into force: Redis was ahead of a restored database."""
    if guard.revision != revision.revision:
        guard.revision = revision.revision
        GuardedSwitch.objects.filter(pk=guard.pk).update(revision=guard.revision)


def check_guards(*, announce: Announce | None = None, clock: Callable[[], datetime] = timezone.now) -> int:
    """Look at every watch that goes on, and end what has to end; how many policies were turned back.

    Raises RedisError or DatabaseError; the next look tries again. Two looks at once turn back once: the switch back
    gives way where another revision came first.
    """
    open_guards = list(GuardedSwitch.objects.filter(state=State.WATCHING)[:100])
    newest = {row.model: row for row in newest_revisions()} if open_guards else {}
    return sum(_look(guard, newest.get(guard.model), clock(), announce) for guard in open_guards)


def read_figures(
    model: str, since: datetime, until: datetime, waits: Sequence[Wait] = ()
) -> dict[str, float | int | None]:
    """The metrics over requests that came and ended in between, and over what still waits.

    Of more than MAX_ROWS that ended the latest are looked at, of many that wait some; each stands for so many.
    Those that came before waited under another policy: they tell nothing of this one. Of the `waits` count those past
    their service level, as misses, and those that outlast what was served, with their wait so far: a policy that lets
    some starve is not judged by those alone whom it serves.
    """
    ended = RequestRecord.objects.filter(
        model=model, finished_at__gte=since, finished_at__lt=until, arrived_at__gte=since
    ).exclude(state="cancelled")
    rows = list(ended.defer("timeline").order_by("-finished_at")[:MAX_ROWS])
    num_ended = ended.count() if len(rows) == MAX_ROWS else len(rows)
    each = num_ended / len(rows) if rows else 1.0
    levels = find_service_levels()
    judged = [(verdict[0], each) for row in rows if (verdict := judge(row, levels)) is not None]
    judged += [(False, wait.stands_for) for wait in waits if allowed_if_late(wait, levels) is not None]
    ttft_s = [(row.ttft_s, each) for row in rows if row.ttft_s is not None]
    e2e_s = [(row.e2e_s, each) for row in rows if row.state == "finished"]
    queued_s = [((row.claimed_at - row.arrived_at).total_seconds(), each) for row in rows if row.claimed_at]
    return {
        "requests": num_ended,
        "waiting": round(sum(wait.stands_for for wait in waits)),
        "judged": round(sum(weight for _, weight in judged)),
        "attainment": _share(judged),
        "ttft_p99_s": _p99(_outlast(ttft_s, waits)),
        "e2e_p99_s": _p99(_outlast(e2e_s, waits)),
        "queue_p99_s": _p99(_outlast(queued_s, waits)),
        "failed": _share([(row.state == "failed", each) for row in rows]),
    }


def _look(guard: GuardedSwitch, newest: PolicyRevision | None, now: datetime, announce: Announce | None) -> bool:
    if newest is None or newest.pk != guard.row_id:
        _end(guard, State.SUPERSEDED, "Another revision came before the watch was over.")
        return False
    _renumber(guard, newest)
    if newest.applied_at is None:  # Redis was away, or the switch is under way
        _begin(guard, now)
        return False
    figures = {
        **read_figures(guard.model, guard.started_at, now, _waits_since(guard)),
        "oldest_wait_s": _oldest_wait_s(guard),
    }
    guard.after = figures
    if sentence := find_breach(guard, figures):
        return _roll_back(guard, newest, sentence, announce)
    if now >= guard.ends_at:
        _end(guard, State.KEPT, _say_kept(guard, figures))
    else:
        GuardedSwitch.objects.filter(pk=guard.pk, state=State.WATCHING).update(after=figures)
    return False


def find_breach(guard: GuardedSwitch, figures: Figures) -> str:
    """Why the guarded figure is worse than allowed, as a sentence; "" where it is not, or too little is known."""
    metric, value = METRICS[guard.metric], figures.get(guard.metric)
    if value is None or not _is_known(guard, figures):
        return ""
    if (value < guard.threshold) if metric.falls else (value > guard.threshold):
        sign = "below" if metric.falls else "above"
        return f"{metric.title} was {value:.4g} {metric.unit}, {sign} the guard's {guard.threshold:g} {metric.unit}."
    return ""


def _is_known(guard: GuardedSwitch, figures: Figures) -> bool:
    """Whether the guarded figure stands on enough requests."""
    if guard.metric == "oldest_wait_s":
        return figures.get("oldest_wait_s") is not None
    names = {"attainment": ("judged",), "failed": ("requests",)}.get(guard.metric, ("requests", "waiting"))
    return sum(figures.get(name) or 0 for name in names) >= MIN_REQUESTS


def _say_kept(guard: GuardedSwitch, figures: Figures) -> str:
    title = METRICS[guard.metric].title
    if _is_known(guard, figures):
        return f"{title} held for {guard.watch_s} s."
    return f"{title} was not judged: too few requests tell of it in {guard.watch_s} s."


def _roll_back(guard: GuardedSwitch, revision: PolicyRevision, sentence: str, announce: Announce | None) -> bool:
    try:
        former = switch_policy(
            model=guard.model,
            name=revision.previous_name or "fifo",
            params=revision.previous_params,
            actor_name=ACTOR,
            reason=f"Rolled back revision {revision.revision}: {sentence}",
            announce=announce,
            after=revision.revision,
        )
    except StaleRevision:
        _end(guard, State.SUPERSEDED, "Another revision came before the policy could be turned back.")
        return False
    except PolicyError as error:  # the former policy is one of another version: the other guards must go on
        logger.error("%s cannot be turned back: %s", guard.model, error)
        _end(guard, State.KEPT, f"{sentence} The former policy cannot be brought back: {error}")
        return False
    guard.rolled_back_to = former.revision
    _end(guard, State.ROLLED_BACK, sentence)
    logger.warning("%s is back at %s: %s", guard.model, former.name, sentence)
    return True


@transaction.atomic
def _end(guard: GuardedSwitch, state: State, verdict: str) -> None:
    guard.state, guard.verdict = state, verdict
    guard.save(update_fields=["state", "verdict", "after", "rolled_back_to"])


def _oldest_wait_s(guard: GuardedSwitch) -> float | None:
    """How long the oldest waiting request has waited since the switch."""
    try:
        snapshot, now_s = execute_many(live_redis(), [FleetQueue(live_keys(), guard.model).snapshot(), TIME])
    except (RedisError, OSError) as error:
        logger.warning("The queue of %s cannot be asked: %s", guard.model, error)
        return None
    if snapshot.oldest_arrival_s is None:
        return 0.0
    waited_s: float = now_s - max(snapshot.oldest_arrival_s, guard.started_at.timestamp())
    return round(max(0.0, waited_s), 3)


def _waits_since(guard: GuardedSwitch) -> list[Wait]:
    """What came since the switch and still waits."""
    started_s = guard.started_at.timestamp()
    try:
        return [wait for wait in read_waits([guard.model])[guard.model] if wait.arrival_s >= started_s]
    except (RedisError, OSError) as error:
        logger.warning("The queue of %s cannot be asked: %s", guard.model, error)
        return []


def _outlast(served: Weighted, waits: Sequence[Wait]) -> Weighted:
    """What was served, and with it what waits longer than any of it did: that will not be less in the end."""
    worst_s = max((seconds for seconds, _ in served), default=0.0)
    return [*served, *((wait.waited_s, wait.stands_for) for wait in waits if wait.waited_s > worst_s)]


def _share(values: Sequence[tuple[bool, float]]) -> float | None:
    total = sum(weight for _, weight in values)
    return round(100 * sum(weight for met, weight in values if met) / total, 3) if values else None


def _p99(values: Weighted) -> float | None:
    """The 99th percentile, the nearest rank upwards."""
    left = 0.01 * sum(weight for _, weight in values)
    for seconds, weight in sorted(values, reverse=True):
        left -= weight
        if left < -1e-6:
            return round(seconds, 4)
    return None


def read_guard(form: Mapping[str, Any]) -> tuple[Guard | None, dict[str, str]]:
    """The guard of a form (`guard.metric`, `guard.threshold`, `guard.watch_s`), None without a metric; and problems."""
    metric = str(form.get("guard.metric", ""))
    if not metric:
        return None, {}
    problems: dict[str, str] = {}
    numbers: dict[str, float] = {}
    for name in ("threshold", "watch_s"):
        try:
            numbers[name] = float(str(form.get(f"guard.{name}", "")))
        except ValueError:
            problems[f"guard.{name}"] = f"{name} must be a number."
    if problems:
        return None, problems
    try:
        whole = int(numbers["watch_s"]) if numbers["watch_s"].is_integer() else 0
        return Guard(metric=metric, threshold=numbers["threshold"], watch_s=whole), {}
    except GuardError as error:
        return None, {f"guard.{str(error).split(' ', 1)[0]}": str(error)}
