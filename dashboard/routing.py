"""Sockets of the dashboard, with the checks of origin and session around them."""

from typing import cast

from channels.auth import AuthMiddlewareStack
from channels.routing import URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.apps import apps
from django.urls import path

from dashboard.apps import DashboardConfig
from dashboard.consumers import LiveConsumer

aggregator = cast(DashboardConfig, apps.get_app_config("dashboard")).aggregator
"""`start()` and `stop()` it with the web process; a first socket starts it too."""
websocket_urlpatterns = [path("live/", LiveConsumer.as_asgi(aggregator=aggregator))]
application = AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter(websocket_urlpatterns)))
"""What the web process mounts for websockets."""
