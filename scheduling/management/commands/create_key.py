"""`manage.py create_key`: a tenant's API key on stdout, everything else on stderr."""

from argparse import ArgumentParser
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from scheduling import services
from scheduling.core.request import Priority
from scheduling.models import Tenant

LIMITS = ("rpm", "tpm", "tpd", "concurrency", "max_priority", "weight")


class Command(BaseCommand):
    help = (
        "Creates an API key, and the tenant where it is missing. Prints the key alone on stdout; it is shown only once."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--tenant", required=True, help="the tenant's name")
        parser.add_argument("--name", default="default", help="what the key is called in the admin")
        parser.add_argument("--rpm", type=int, help="requests per minute (0: no limit)")
        parser.add_argument("--tpm", type=int, help="tokens per minute (0: no limit)")
        parser.add_argument("--tpd", type=int, help="tokens per day (0: no limit)")
        parser.add_argument("--concurrency", type=int, help="concurrent requests (0: no limit)")
        parser.add_argument("--weight", type=float, help="share of the fleet under the fair policy")
        parser.add_argument(
            "--max-priority",
            help="highest priority: critical, realtime, high, normal, low, bulk, or 0-5",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        given = {name: options[name] for name in LIMITS if options[name] is not None}
        if "max_priority" in given:
            given["max_priority"] = _priority(str(given["max_priority"]))
        for name in ("rpm", "tpm", "tpd", "concurrency"):
            if given.get(name) == 0:
                given[name] = None
        try:
            key = self._create(options["tenant"], options["name"], given)
        except ValidationError as error:
            raise CommandError(_sentences(error)) from error
        self.stdout.write(key)

    @transaction.atomic
    def _create(self, name: str, key_name: str, given: dict[str, Any]) -> str:
        tenant = Tenant.objects.filter(name=name).first()
        if tenant is None:
            tenant = services.create_tenant(name=name, **given)
            self.stderr.write(f"Created tenant {name}.")
        elif given:
            tenant = services.update_tenant(tenant=tenant, reason="create_key", **given)
            self.stderr.write(f"Changed {', '.join(sorted(given))} of tenant {name}.")
        return services.create_key(tenant=tenant, name=key_name)


def _priority(text: str) -> int:
    try:
        return Priority[text.upper()] if not text.isdigit() else Priority(int(text))
    except (KeyError, ValueError) as error:
        names = ", ".join(p.name.lower() for p in Priority)
        raise CommandError(f"{text} is no priority; there are {names}, or 0 to 5.") from error


def _sentences(error: ValidationError) -> str:
    if hasattr(error, "message_dict"):
        return " ".join(f"{field}: {' '.join(texts)}" for field, texts in error.message_dict.items())
    return " ".join(error.messages)
