"""`manage.py create_token`: an operator's API token on stdout."""

from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from controlplane.tokens import create_token


class Command(BaseCommand):
    help = "Creates an API token that acts as a user. Prints the token alone on stdout; it is shown only once."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--user", required=True, help="whose rights the token has")
        parser.add_argument("--name", required=True, help="what it is for")
        parser.add_argument("--days", type=float, help="how long it can be used (default: until it is revoked)")

    def handle(self, *args: Any, user: str, name: str, days: float | None, **options: Any) -> None:
        account = User.objects.filter(username=user).first()
        if account is None:
            raise CommandError(f"There is no user {user}.")
        expires_at = None if days is None else timezone.now() + timedelta(days=days)
        try:
            _, plaintext = create_token(user=account, name=name, expires_at=expires_at, reason="create_token")
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from error
        self.stdout.write(plaintext)
