"""Reads of the desired state."""

from scheduling.models import ServiceLevel


def find_service_levels() -> dict[tuple[str, int], ServiceLevel]:
    """Targets by tenant and priority; the default for all tenants stands under the empty name."""
    rows = ServiceLevel.objects.select_related("tenant")
    return {(row.tenant.name if row.tenant else "", row.priority): row for row in rows}
