"""The dashboard app: the operator's pages."""

from django.apps import AppConfig


class DashboardConfig(AppConfig):
    """Live page, its socket and its static files."""

    name = "dashboard"
