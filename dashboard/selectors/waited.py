"""Why a recorded request waited: who was served before it, how its policy ranked it, what room its worker had."""

from collections import Counter
from datetime import timedelta

from dashboard.selectors.waiting import explain_place
from inference.models import BatchRecord, RequestRecord
from scheduling.core.request import QueueEntry
from scheduling.models import PolicyRevision, Tenant

HARDLY = timedelta(milliseconds=20)
LOOK = timedelta(hours=1)
"""Of a longer wait, the last so much is looked at, and of those served meanwhile the ones that ended as soon."""
MAX_BEFORE = 2000
MAX_NAMED = 4


def explain_waited(row: RequestRecord) -> list[str]:
    """Sentences; a few bounded queries."""
    until = row.claimed_at or row.finished_at
    if until - row.arrived_at <= HARDLY:
        return ["It hardly waited: there was room."]
    return [text for text in (_before(row), _rank(row), _room(row)) if text]


def _before(row: RequestRecord) -> str:
    """Whom its worker's model served meanwhile, as far as that has ended."""
    until = row.claimed_at or row.finished_at
    since = max(row.arrived_at, until - LOOK)
    others = RequestRecord.objects.filter(
        model=row.model,
        finished_at__gte=since,
        finished_at__lt=until + LOOK,
        claimed_at__gt=since,
        claimed_at__lte=until,
    ).exclude(pk=row.pk)
    found = list(others.values_list("tenant", "arrived_at")[:MAX_BEFORE])
    if not found:
        return "No other request of the model was claimed meanwhile."
    later = sum(arrived > row.arrived_at for _, arrived in found)
    tenants = Counter(tenant for tenant, _ in found).most_common()
    named = ", ".join(f"{num} of {tenant}" for tenant, num in tenants[:MAX_NAMED])
    more = f" and {sum(num for _, num in tenants[MAX_NAMED:])} of others" if len(tenants) > MAX_NAMED else ""
    came = f" {later} of them came after it." if later else ""
    most = "at least " if len(found) == MAX_BEFORE else ""
    if len(found) == 1:
        after = ", which came after it" if later else ""
        return f"Behind a request of {found[0][0]} that was claimed while it waited{after}."
    return f"Behind {most}{len(found)} requests that were claimed while it waited: {named}{more}.{came}"


def _rank(row: RequestRecord) -> str:
    revision = PolicyRevision.objects.filter(model=row.model, revision=row.policy_revision, name=row.policy).first()
    if not row.policy:
        return ""
    share = Tenant.objects.filter(name=row.tenant).values_list("weight", flat=True).first()
    entry = QueueEntry(
        id=row.request_id,
        tenant=row.tenant,
        priority=row.priority,
        arrival_s=row.arrived_at.timestamp(),
        prompt_tokens=row.prompt_tokens,
        max_tokens=row.max_tokens,
        deadline_s=row.deadline_at.timestamp() if row.deadline_at else None,
        share=share or 1.0,
    )
    return explain_place(row.policy, revision.params if revision else {}, row.policy_revision, entry)


def _room(row: RequestRecord) -> str:
    """What the worker that claimed it had to give in the second before."""
    if row.claimed_at is None:
        return ""
    seconds = BatchRecord.objects.filter(replica=row.replica, second__lte=row.claimed_at)
    batch = seconds.filter(second__gt=row.claimed_at - timedelta(seconds=5)).order_by("-second").first()
    if batch is None:
        return ""
    size = f" of {batch.max_batch_size}" if batch.max_batch_size else ""
    used = batch.kv_blocks_used / batch.kv_blocks_total if batch.kv_blocks_total else 0.0
    ran = f"{row.replica} ran {batch.batch_size_mean:.1f}{size} slots"
    return f"Before its claim {ran}, with {used:.0%} of its KV cache in use."
