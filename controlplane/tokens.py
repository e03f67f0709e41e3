"""Operators' tokens: made, shown once, looked up by digest, revoked; each change is audited."""

from datetime import datetime, timedelta
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone

from controlplane.models import OperatorToken
from scheduling.audit import record_action
from scheduling.credentials import digest_key, generate_key

KIND = "pso"
"""What a token begins with, so that it is told from a tenant's key."""
USE_NOTED_EVERY = timedelta(minutes=1)


@transaction.atomic
def create_token(
    *, user: User, name: str, expires_at: datetime | None = None, actor: User | None = None, reason: str = ""
) -> tuple[OperatorToken, str]:
    """A new token and its plain text, which can be read this once. Without a reason, its name says what it is for.

    Raises ValidationError.
    """
    new = generate_key(KIND)
    token = OperatorToken(user=user, name=name, prefix=new.prefix, digest=new.digest, expires_at=expires_at)
    token.full_clean()
    token.save()
    after = {"name": name, "expires_at": expires_at}
    record_action(
        actor=actor or user, action="token.create", target=token.audit_name, after=after, reason=reason or name
    )
    return token, new.plaintext


@transaction.atomic
def revoke_token(*, token: OperatorToken, actor: User | None = None, reason: str = "") -> None:
    """Refuse it from now on."""
    now = timezone.now()
    if OperatorToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=now):
        states: Any = {"before": {"revoked_at": None}, "after": {"revoked_at": now}}
        record_action(actor=actor, action="token.revoke", target=token.audit_name, reason=reason, **states)


def find_token(plaintext: str) -> OperatorToken | None:
    """The usable token, with its user; None where it is unknown, revoked, expired, or its user may not sign in."""
    usable = OperatorToken.objects.filter(OperatorToken.usable(), digest=digest_key(plaintext))
    token: OperatorToken | None = usable.select_related("user").first()
    if token is None:
        return None
    now = timezone.now()
    if token.last_used_at is None or now - token.last_used_at > USE_NOTED_EVERY:
        OperatorToken.objects.filter(pk=token.pk).update(last_used_at=now)
    return token
