"""Refusals over time: the store's counters only grow, so what they grew by is written into minutes and hours."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from django.db import transaction
from django.db.models import F, Sum
from django.utils import timezone

from dashboard.models import RefusalCount, RefusalRollup, RequestRollup, Resolution, RollupCheckpoint
from dashboard.rollups import REQUESTS, Levels, find_level
from scheduling.connection import live_keys, live_redis
from scheduling.selectors import find_service_levels
from scheduling.store import Command, execute_many

SOURCE = "refusals"
MAX_NAME = 300


def roll_up_refusals() -> int:
    """Write down what was refused since the last call; how many. Raises RedisError, OSError or DatabaseError."""
    keys = live_keys()
    hashes = [Command(("HGETALL", key), read_pairs) for key in (keys.refusals, keys.turned_away)]
    return add_refusals(*execute_many(live_redis(), hashes), now=timezone.now())


@transaction.atomic
def add_refusals(counters: Mapping[str, int], turned_away: Mapping[str, int], *, now: datetime) -> int:
    """The same for these counters: refusals as `model|tenant|reason`, and as `model|tenant|priority` those for want of
    capacity, which are misses of their service level. The first call only remembers them: it knows no times.
    """
    _, is_first = RollupCheckpoint.objects.get_or_create(source=SOURCE)
    RollupCheckpoint.objects.get_or_create(source=REQUESTS)
    # Of two calls at once, one counts; and nobody else adds to the sums of requests meanwhile.
    list(RollupCheckpoint.objects.select_for_update().filter(source__in=(SOURCE, REQUESTS)).order_by("source"))
    known = dict(RefusalCount.objects.values_list("name", "num"))
    levels = find_service_levels()
    num_added = 0
    for name, num in _grown(counters, known, is_first=is_first):
        _add_refusals(name, num, now)
        num_added += num
    for name, num in _grown(turned_away, known, is_first=is_first):
        _add_misses(name, num, levels, now)
    return num_added


def _grown(counters: Mapping[str, int], known: Mapping[str, int], *, is_first: bool) -> Iterator[tuple[str, int]]:
    """Counters that grew, by how much; what they are at now is remembered."""
    for name, num in counters.items():
        before = known.get(name, 0)
        if num == before or len(name) > MAX_NAME:
            continue
        RefusalCount.objects.update_or_create(name=name, defaults={"num": num})
        if not is_first:
            # A counter that went back began anew, since the store lost its data.
            yield name, num - before if num > before else num


def _add_refusals(name: str, num: int, now: datetime) -> None:
    model, tenant, reason = name.rsplit("|", 2)
    for resolution, start in _grains(now):
        grain, _ = RefusalRollup.objects.get_or_create(
            resolution=resolution, start=start, model=model, tenant=tenant, reason=reason
        )
        RefusalRollup.objects.filter(pk=grain.pk).update(num=F("num") + num)


def _add_misses(name: str, num: int, levels: Levels, now: datetime) -> None:
    model, tenant, priority = name.rsplit("|", 2)
    level = find_level(levels, tenant, int(priority))
    changes = {"refused": F("refused") + num}
    if level is not None:
        allowed = num * (1 - level.objective_percent / 100)
        changes |= {"judged": F("judged") + num, "allowed": F("allowed") + allowed}
    for resolution, start in _grains(now):
        grain, _ = RequestRollup.objects.get_or_create(
            resolution=resolution, start=start, model=model, tenant=tenant, priority=int(priority)
        )
        RequestRollup.objects.filter(pk=grain.pk).update(**changes)


def _grains(now: datetime) -> list[tuple[int, datetime]]:
    return [(size, datetime.fromtimestamp(now.timestamp() // size * size, UTC)) for size in Resolution.values]


def read_refusals(since: datetime, resolution: Resolution) -> dict[str, dict[str, int]]:
    """Tenant -> reason -> how many since then, most first; whole grains."""
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    rows = RefusalRollup.objects.filter(resolution=resolution, start__gte=since).values("tenant", "reason")
    for row in rows.annotate(sum=Sum("num")).order_by("-sum", "reason"):
        found[row["tenant"]][row["reason"]] = row["sum"]
    return dict(found)


def read_pairs(reply: Any) -> dict[str, int]:
    """A hash of counters, as either protocol of Redis answers it."""
    return {name.decode(): int(num) for name, num in _pairs(reply)}


def _pairs(reply: Mapping[bytes, bytes] | Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    return iter(reply.items()) if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
