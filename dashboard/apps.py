"""The dashboard app: the operator's pages."""

from functools import cached_property, partial
from typing import TYPE_CHECKING

from django.apps import AppConfig
from django.conf import settings

if TYPE_CHECKING:
    from dashboard.aggregator import Aggregator

REDIS_TIMEOUT_S = 2.0


class DashboardConfig(AppConfig):
    """Live page, its socket and its static files."""

    name = "dashboard"

    @cached_property
    def aggregator(self) -> "Aggregator":
        """This process's aggregator; it connects and reads once it is started."""
        # Models can be imported only after the apps are set up.
        from channels.db import database_sync_to_async

        from dashboard.aggregator import Aggregator
        from dashboard.document import DocumentBuilder
        from dashboard.readings import FleetReader
        from dashboard.selectors.activity import read_activity
        from dashboard.selectors.service import ServiceWatch
        from scheduling.keys import Keys
        from scheduling.store import aconnect

        config = settings.PENSTOCK
        client = aconnect(config.redis, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S)
        return Aggregator(
            reader=FleetReader(client, Keys(prefix=config.key_prefix)),
            builder=DocumentBuilder(queue_limit=config.queue_limit),
            read_activity=database_sync_to_async(partial(read_activity, ServiceWatch())),
        )
