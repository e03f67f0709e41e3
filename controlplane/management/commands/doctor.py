"""`manage.py doctor`: checks a deployment and says what to mend."""

import json
from argparse import ArgumentParser
from dataclasses import asdict
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

import controlplane.celery  # noqa: F401  # the app that the workers are asked through
from controlplane.doctor import Finding, examine

MARKS = {"ok": "  ok", "warn": "warn", "fail": "FAIL"}


class Command(BaseCommand):
    help = "Checks database, Redis, workers, clocks, disk, checkpoints, secrets and versions; says what to mend."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="findings as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        findings: list[Finding] = []
        for finding in examine(settings.PENSTOCK):
            findings.append(finding)
            if not options["json"]:
                self._show(finding)
        if options["json"]:
            self.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1))
        if num_failed := sum(finding.level == "fail" for finding in findings):
            raise CommandError(f"{num_failed} of {len(findings)} checks failed.")

    def _show(self, finding: Finding) -> None:
        self.stdout.write(f"{MARKS[finding.level]}  {finding.name}: {finding.detail}")
        if finding.mend:
            self.stdout.write(f"      {finding.mend}")
        self.stdout.flush()
