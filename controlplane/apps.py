"""The control plane's app, and the admin site in place of Django's."""

from django.apps import AppConfig
from django.contrib.admin.apps import AdminConfig
from django.db.models.signals import post_migrate


class ControlPlaneConfig(AppConfig):
    """Access: administrators and operators' tokens."""

    name = "controlplane"
    verbose_name = "Access"

    def ready(self) -> None:
        """Make the group administrator after each migration; this app comes last, when all permissions are there."""
        from controlplane.roles import grant_administrators

        post_migrate.connect(grant_administrators, sender=self)


class PenstockAdminConfig(AdminConfig):
    """Django's admin, on our site."""

    default_site = "controlplane.admin_site.PenstockAdminSite"
