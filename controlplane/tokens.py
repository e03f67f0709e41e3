"""Operators' tokens: made, shown once, looked up by digest, revoked; each change is audited."""

from datetime import datetime, timedelta

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
    """A new token and its plain text, which can be read this once. Raises ValidationError."""
    new = generate_key(KIND)
    token = OperatorToken(user=user, name=name, prefix=new.prefix, digest=new.digest, expires_at=expires_at)
    token.full_clean()
    token.save()
    after = {"name": name, "expires_at": expires_at}
    target = _target(token)
    record_action(actor=actor or user, action="token.create", target=target, after=after, reason=reason)
    return token, new.plaintext


@transaction.atomic
def revoke_token(*, token: OperatorToken, actor: User | None = None, reason: str = "") -> None:
    """Refuse it from now on."""
    if OperatorToken.objects.filter(pk=token.pk, revoked_at=None).update(revoked_at=timezone.now()):
        record_action(actor=actor, action="token.revoke", target=_target(token), reason=reason)


def find_user(plaintext: str) -> User | None:
    """Whose usable token this is; None where it is unknown, revoked, expired, or its user may not sign in."""
    usable = OperatorToken.objects.filter(OperatorToken.usable(), digest=digest_key(plaintext))
    token = usable.select_related("user").first()
    if token is None:
        return None
    now = timezone.now()
    if token.last_used_at is None or now - token.last_used_at > USE_NOTED_EVERY:
        OperatorToken.objects.filter(pk=token.pk).update(last_used_at=now)
    user: User = token.user
    return user


def _target(token: OperatorToken) -> str:
    return f"{token.user.get_username()}/{token.prefix}"
