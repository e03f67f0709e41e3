"""Offline work of all tenants, for those who watch over it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db.models import Count

from controlplane.models import Batch, BatchLine
from controlplane.offline.files import ACTIVE

MAX_LISTED = 200
COUNTED = (Batch.Status.IN_PROGRESS, Batch.Status.FINALIZING, Batch.Status.CANCELLING)
"""While these go on, lines are counted; afterwards the sums stand with the batch."""
CANCELLABLE = (Batch.Status.VALIDATING, Batch.Status.IN_PROGRESS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A batch and how far it is."""

    batch: Batch
    completed: int
    failed: int
    submitted: int
    """Of what is left, in the queue or running."""

    @property
    def ended_at(self) -> datetime | None:
        reached = None if self.batch.status in ACTIVE else self.batch.moments.get(self.batch.status)
        return None if reached is None else datetime.fromtimestamp(reached, UTC)

    @property
    def done(self) -> int:
        return self.completed + self.failed

    @property
    def can_cancel(self) -> bool:
        return self.batch.status in CANCELLABLE


def list_work(*, tenant: str = "", status: str = "", limit: int = MAX_LISTED) -> list[Work]:
    """What goes on first, then what ended, latest first; two queries."""
    rows = Batch.objects.all()
    if tenant:
        rows = rows.filter(tenant=tenant)
    if status:
        rows = rows.filter(status=status)
    limit = min(limit, MAX_LISTED)
    active = list(rows.filter(status__in=ACTIVE).order_by("-created_at", "-id")[:limit])
    ended = list(rows.exclude(status__in=ACTIVE).order_by("-created_at", "-id")[: limit - len(active)])
    return _with_counts([*active, *ended])


def find_work(batch_id: str) -> Work | None:
    """One batch, of whatever tenant."""
    batch = None if "\0" in batch_id else Batch.objects.filter(id=batch_id[:64]).first()
    return None if batch is None else _with_counts([batch])[0]


def _with_counts(batches: Sequence[Batch]) -> list[Work]:
    counts: defaultdict[str, dict[str, int]] = defaultdict(dict)
    lines = BatchLine.objects.filter(batch_id__in=[batch.id for batch in batches if batch.status in COUNTED])
    for batch_id, state, num in lines.values_list("batch_id", "state").annotate(num=Count("id")).order_by():
        counts[batch_id][state] = num
    return [
        Work(
            batch=batch,
            completed=counts[batch.id].get("completed", 0) if batch.status in COUNTED else batch.num_completed,
            failed=counts[batch.id].get("failed", 0) if batch.status in COUNTED else batch.num_failed,
            submitted=counts[batch.id].get("submitted", 0),
        )
        for batch in batches
    ]
