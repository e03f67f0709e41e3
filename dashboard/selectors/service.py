"""How the requests of the last minute were served, by tenant and priority, against their service levels."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from django.utils import timezone

from dashboard.rollups import Levels, find_level, judge
from dashboard.state import Document, prune
from inference.models import RequestRecord
from scheduling.models import ServiceLevel
from scheduling.selectors import find_service_levels

WINDOW = timedelta(seconds=60)
MAX_REQUESTS = 5000
"""Of the last minute, the latest so many are looked at."""
MAX_ROWS = 24
"""Pairs of tenant and priority shown of a model: those with most requests."""
FIELDS = (
    "model", "tenant", "priority", "state", "arrived_at", "first_token_at", "finished_at", "completion_tokens",
)  # fmt: skip


class _Served(NamedTuple):
    finished_at: datetime
    model: str
    tenant: str
    priority: int
    ttft_s: float | None
    tpot_s: float | None
    met: bool | None


class ServiceWatch:
    """Reads what the historian has added since the last look, so that a look costs what a second brings."""

    def __init__(self, clock: Callable[[], datetime] = timezone.now) -> None:
        self._clock = clock
        self._last_id = 0
        self._served: deque[_Served] = deque(maxlen=MAX_REQUESTS)

    def read(self) -> Document:
        """Model -> `tenant/priority` -> figures in seconds. Raises DatabaseError."""
        levels, since = find_service_levels(), self._clock() - WINDOW
        rows = RequestRecord.objects.filter(id__gt=self._last_id, finished_at__gte=since).only(*FIELDS)
        for row in reversed(rows.order_by("-id")[:MAX_REQUESTS]):
            self._last_id = row.pk
            judged = judge(row, levels)
            met = None if judged is None else judged[0]
            times = (row.ttft_s, row.tpot_s) if row.state == "finished" else (None, None)
            self._served.append(_Served(row.finished_at, row.model, row.tenant, row.priority, *times, met))
        groups: defaultdict[str, defaultdict[tuple[str, int], list[_Served]]] = defaultdict(lambda: defaultdict(list))
        for one in self._served:
            if one.finished_at >= since:
                groups[one.model][one.tenant, one.priority].append(one)
        return {model: _model(by_pair, levels) for model, by_pair in groups.items()}


def _model(by_pair: dict[tuple[str, int], list[_Served]], levels: Levels) -> Document:
    busiest = sorted(by_pair.items(), key=lambda item: -len(item[1]))[:MAX_ROWS]
    return {
        f"{tenant}/{priority}": prune(_figures(served, find_level(levels, tenant, priority)))
        for (tenant, priority), served in sorted(busiest, key=lambda item: (item[0][1], item[0][0]))
    }


def _figures(served: Sequence[_Served], level: ServiceLevel | None) -> Document:
    judged = [one.met for one in served if one.met is not None]
    return {
        "tenant": served[0].tenant,
        "priority": served[0].priority,
        "num": len(served),
        "ttft": _percentiles([one.ttft_s for one in served], level.ttft_ms if level else None),
        "tpot": _percentiles([one.tpot_s for one in served], level.tpot_ms if level else None),
        "met": round(sum(judged) / len(judged), 4) if judged else None,
        "objective": level.objective_percent / 100 if level else None,
    }


def _percentiles(values: Sequence[float | None], target_ms: int | None) -> Document:
    known = sorted(value for value in values if value is not None)
    return {
        "p50_s": round(known[len(known) // 2], 4) if known else None,
        "p99_s": round(known[min(len(known) - 1, int(0.99 * len(known)))], 4) if known else None,
        "target_s": None if target_ms is None else target_ms / 1000,
    }
