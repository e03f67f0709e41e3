"""Requests that wait longer than they were promised: missed, though no record tells of them before their end."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dashboard.rollups import Levels, find_level
from scheduling.connection import live_keys, live_redis
from scheduling.fleet import FleetQueue
from scheduling.store import TIME, execute_many

MAX_WAITS = 2000
"""Waiting requests of a model that are looked at; of more, so many at random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """A request in the queue. `arrival_s` is unix time; `stands_for` how many like it, where not all were read."""

    tenant: str
    priority: int
    arrival_s: float
    waited_s: float
    stands_for: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """Requests past their targets, and the misses that their objectives allow for so many."""

    num: int = 0
    allowed: float = 0.0


def read_waits(models: Sequence[str]) -> dict[str, list[Wait]]:
    """What waits, by model. Raises RedisError or OSError."""
    if not models:
        return {}
    queues = [FleetQueue(live_keys(), model) for model in models]
    commands = [command for queue in queues for command in (queue.snapshot(), queue.sample(MAX_WAITS))]
    now_s, *answers = execute_many(live_redis(), [TIME, *commands])
    found = {}
    for place, model in enumerate(models):
        snapshot, entries = answers[2 * place : 2 * place + 2]
        stands_for = max(1.0, snapshot.depth / len(entries)) if entries else 1.0
        found[model] = [
            Wait(
                tenant=entry.tenant,
                priority=entry.priority,
                arrival_s=entry.arrival_s,
                waited_s=max(0.0, now_s - entry.arrival_s),
                stands_for=stands_for,
            )
            for entry in entries
        ]
    return found


def allowed_if_late(wait: Wait, levels: Levels) -> float | None:
    """The misses that the objective allows for a request that waits past its service level; None for any other."""
    level = find_level(levels, wait.tenant, wait.priority)
    if level is None:
        return None
    targets = [target_ms for target_ms in (level.ttft_ms, level.e2e_ms) if target_ms is not None]
    if not targets or wait.waited_s * 1000 <= min(targets):
        return None
    return 1 - level.objective_percent / 100


def count_late(waits: Mapping[str, Iterable[Wait]], levels: Levels) -> dict[tuple[str, str], Late]:
    """By model and tenant."""
    nums: defaultdict[tuple[str, str], float] = defaultdict(float)
    allowed: defaultdict[tuple[str, str], float] = defaultdict(float)
    for model, waiting in waits.items():
        for wait in waiting:
            share = allowed_if_late(wait, levels)
            if share is not None:
                nums[model, wait.tenant] += wait.stands_for
                allowed[model, wait.tenant] += share * wait.stands_for
    return {key: Late(num=round(num), allowed=allowed[key]) for key, num in nums.items()}
