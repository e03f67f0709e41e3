"""Refusals over time: the store's counters only grow, so what they grew by is written into minutes and hours."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from django.db import transaction
from django.db.models import F, Sum
from django.utils import timezone

from dashboard.models import RefusalCount, RefusalRollup, Resolution, RollupCheckpoint
from scheduling.connection import live_keys, live_redis
from scheduling.store import Command, execute

SOURCE = "refusals"
MAX_NAME = 300


def roll_up_refusals() -> int:
    """Write down what was refused since the last call; how many. Raises RedisError, OSError or DatabaseError."""
    counters = execute(live_redis(), Command(("HGETALL", live_keys().refusals), read_pairs))
    return add_refusals(counters, timezone.now())


@transaction.atomic
def add_refusals(counters: Mapping[str, int], now: datetime) -> int:
    """The same for these counters (`model|tenant|reason`). The first call only remembers them: it knows no times."""
    _, is_first = RollupCheckpoint.objects.get_or_create(source=SOURCE)
    RollupCheckpoint.objects.select_for_update().get(source=SOURCE)  # of two calls at once, one counts
    known = dict(RefusalCount.objects.values_list("name", "num"))
    grown = {name: num for name, num in counters.items() if num != known.get(name) and len(name) <= MAX_NAME}
    num_added = 0
    for name, num in grown.items():
        before = known.get(name, 0)
        RefusalCount.objects.update_or_create(name=name, defaults={"num": num})
        if not is_first:
            # A counter that went back began anew, since the store lost its data.
            num_added += _add(name, num - before if num > before else num, now)
    return num_added


def _add(name: str, num: int, now: datetime) -> int:
    model, tenant, reason = name.rsplit("|", 2)
    for resolution in Resolution.values:
        start = datetime.fromtimestamp(now.timestamp() // resolution * resolution, UTC)
        grain, _ = RefusalRollup.objects.get_or_create(
            resolution=resolution, start=start, model=model, tenant=tenant, reason=reason
        )
        RefusalRollup.objects.filter(pk=grain.pk).update(num=F("num") + num)
    return num


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
