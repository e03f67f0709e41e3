"""Sockets of the dashboard, with the checks of origin and session around them."""

from typing import Any, cast

from channels.auth import AuthMiddlewareStack
from channels.routing import URLRouter
from channels.security.websocket import WebsocketDenier
from django.apps import apps
from django.conf import settings
from django.urls import path, re_path

from dashboard.aggregator import Aggregator
from dashboard.apps import DashboardConfig
from dashboard.consumers import LiveConsumer
from dashboard.socket_origin import OwnOriginValidator


def build_sockets(aggregator: Aggregator) -> Any:
    """The ASGI application that serves sockets from this aggregator, to our own pages only."""
    others = WebsocketDenier.as_asgi()  # else every stray address is an error in the log
    urls = [path("live/", LiveConsumer.as_asgi(aggregator=aggregator)), re_path("", others)]
    sockets = AuthMiddlewareStack(URLRouter(urls))
    return OwnOriginValidator(sockets, allowed_hosts=settings.ALLOWED_HOSTS, trusted=settings.CSRF_TRUSTED_ORIGINS)


aggregator = cast(DashboardConfig, apps.get_app_config("dashboard")).aggregator
"""`start()` and `stop()` it with the web process; a first socket starts it too."""
application = build_sockets(aggregator)
"""What the web process mounts for websockets."""
