"""Reads of deployments and history."""

from collections.abc import Mapping
from datetime import datetime

from django.db.models import QuerySet

from inference.models import BatchRecord, ModelDeployment, RequestRecord


def list_deployments() -> QuerySet[ModelDeployment]:
    """Models on offer, newest first: a gpu worker without a model of its own serves the first."""
    return ModelDeployment.objects.filter(enabled=True).order_by("-created_at")


def find_request(request_id: str) -> RequestRecord | None:
    """A request that ended and whose record the historian wrote."""
    return RequestRecord.objects.filter(request_id=request_id).first()


def list_requests(*, since: datetime, filters: Mapping[str, str] | None = None) -> QuerySet[RequestRecord]:
    """Requests that ended since then, newest first; `filters` by field, such as tenant or model."""
    return RequestRecord.objects.filter(finished_at__gte=since, **(filters or {}))


def list_batches(*, since: datetime, replica: str = "") -> QuerySet[BatchRecord]:
    """Seconds since then in order of time, of one replica or all."""
    rows = BatchRecord.objects.filter(second__gte=since).order_by("second", "replica")
    return rows.filter(replica=replica) if replica else rows
