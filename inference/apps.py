"""The inference app: running it."""

from django.apps import AppConfig
from django.db.models.signals import post_migrate


class InferenceConfig(AppConfig):
    """Deployments, replicas, history of requests and batches."""

    name = "inference"
    verbose_name = "Inference"

    def ready(self) -> None:
        """Make the groups after each migration: permissions, which Django makes then too, do not exist any earlier."""
        from inference.roles import create_groups

        post_migrate.connect(create_groups, sender=self)
