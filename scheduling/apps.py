"""The scheduling app: who goes next."""

from django.apps import AppConfig


class SchedulingConfig(AppConfig):
    """Tenants, keys, quotas, service levels, policy revisions."""

    name = "scheduling"
    verbose_name = "Scheduling"
