"""Make the demo's accounts and model where they are missing."""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from controlplane.demo import offer_model, prepare_accounts, secrets_path, train_model


class Command(BaseCommand):
    """`manage.py setup_demo`."""

    help = "Make the demo's model, tenants, keys and operator where they are missing. `up` does this too."

    def handle(self, *args: Any, **options: Any) -> None:
        train_model(settings.PENSTOCK)
        offer_model(settings.PENSTOCK)
        if prepare_accounts(settings.PENSTOCK):
            self.stdout.write(f"The operator's login and the tenants' keys are in {secrets_path(settings.PENSTOCK)}.")
        else:
            self.stdout.write("This system has tenants of its own; no demo accounts were made.")
