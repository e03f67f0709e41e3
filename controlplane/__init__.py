"""The Django project: settings, API, admin, health and metrics."""

VERSION = "0.1.0"
