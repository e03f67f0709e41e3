"""The inference app: running it."""

from django.apps import AppConfig


class InferenceConfig(AppConfig):
    """Deployments, replicas, history of requests and batches."""

    name = "inference"
    verbose_name = "Inference"
