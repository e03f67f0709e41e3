"""Runs a replay that an operator asked for on the page of policies; the ops worker starts this."""

import os
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from dashboard.what_if import replay


class Command(BaseCommand):
    help = "Run a what-if that was asked for, by its number."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("run", type=int)

    def handle(self, *args: Any, **options: Any) -> None:
        os.nice(10)  # whatever serves requests on this machine goes first
        replay(options["run"])
