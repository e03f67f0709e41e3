"""Reads of the desired state."""

from scheduling.models import ServiceLevel, Tenant


def find_service_levels() -> dict[tuple[str, int], ServiceLevel]:
    """Targets by tenant and priority; the default for all tenants stands under the empty name."""
    rows = ServiceLevel.objects.select_related("tenant")
    return {(row.tenant.name if row.tenant else "", row.priority): row for row in rows}


def find_weights() -> dict[str, float]:
    """Tenant -> its weight."""
    return dict(Tenant.objects.values_list("name", "weight"))
