"""Offline work of all tenants, for those who watch over it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db.models import Count, Q

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


def list_work(*, tenant: str = "", status: str = "", after: str = "", limit: int = MAX_LISTED) -> list[Work]:
    """What goes on first, then what ended, latest first, from after the batch `after` on; three queries at most.

    Nothing where there is no such batch.
    """
    last = _find_batch(after) if after else None
    if after and last is None:
        return []
    rows = Batch.objects.all()
    if tenant:
        rows = rows.filter(tenant=tenant)
    if status:
        rows = rows.filter(status=status)
    limit = min(limit, MAX_LISTED)
    active, ended = rows.filter(status__in=ACTIVE), rows.exclude(status__in=ACTIVE)
    if last is not None and last.status in ACTIVE:
        active = active.filter(_older(last))
    elif last is not None:
        active, ended = active.none(), ended.filter(_older(last))
    first = list(active.order_by("-created_at", "-id")[:limit])
    return _with_counts([*first, *ended.order_by("-created_at", "-id")[: limit - len(first)]])


def _older(batch: Batch) -> Q:
    return Q(created_at__lt=batch.created_at) | Q(created_at=batch.created_at, id__lt=batch.id)


def find_work(batch_id: str) -> Work | None:
    """One batch, of whatever tenant."""
    batch = _find_batch(batch_id)
    return None if batch is None else _with_counts([batch])[0]


def _find_batch(batch_id: str) -> Batch | None:
    return None if "\0" in batch_id else Batch.objects.filter(id=batch_id[:64]).first()


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
