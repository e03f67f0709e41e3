"""Reads of the desired state and its history, for pages and the native API."""

from django.db.models import QuerySet

from scheduling.models import OperatorAction, PolicyRevision, ServiceLevel


def list_revisions(*, model: str = "", limit: int = 50) -> QuerySet[PolicyRevision]:
    """The last switches, newest first; of all models where none is named."""
    rows = PolicyRevision.objects.select_related("actor")
    return (rows.filter(model=model) if model else rows)[:limit]


def list_actions(*, limit: int = 50) -> QuerySet[OperatorAction]:
    """The last entries of the audit trail, newest first."""
    return OperatorAction.objects.all()[:limit]


def find_service_levels() -> dict[tuple[str, int], ServiceLevel]:
    """Targets by tenant and priority; the default for all tenants stands under the empty name."""
    rows = ServiceLevel.objects.select_related("tenant")
    return {(row.tenant.name if row.tenant else "", row.priority): row for row in rows}
