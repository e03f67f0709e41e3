"""Become the embedded Redis server, in the foreground."""

import os
import signal
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from controlplane.child import die_with_parent
from controlplane.embedded_redis import NoServer, server_command


class Command(BaseCommand):
    """`manage.py run_redis`."""

    help = "Run the embedded Redis server (where REDIS_URL is empty) until a signal stops it."
    requires_system_checks: list[str] = []

    def handle(self, *args: Any, **options: Any) -> None:
        """Replace this process by the server; it gets SIGTERM, and so saves its data, when the parent dies."""
        if settings.PENSTOCK.redis_url:
            raise CommandError("REDIS_URL names a server already; unset it to run the embedded one.")
        try:
            command = server_command(settings.PENSTOCK)
        except NoServer as error:
            raise CommandError(str(error)) from None
        die_with_parent(signal.SIGTERM, os.getppid())
        os.execv(command[0], command)  # noqa: S606
