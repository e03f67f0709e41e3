"""Tokens by which operators' scripts call the native API."""

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils import timezone

MAX_ACTIVE = 20
"""Usable tokens of one user."""


class OperatorToken(models.Model):
    """A token acts as its user, with the rights of that user's groups at the time. Only its digest is stored."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=120, help_text="What it is for, such as the script that holds it.")
    prefix = models.CharField(max_length=16, editable=False)
    digest = models.CharField(max_length=64, unique=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True, help_text="Empty: until it is revoked.")
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]
        permissions = [("use_admin", "Can use the administration")]

    def __str__(self) -> str:
        return f"{self.name} ({self.shown})"

    def clean(self) -> None:
        """Raises ValidationError."""
        if self.expires_at is not None and self.expires_at <= timezone.now():
            raise ValidationError({"expires_at": "The time of expiry has passed."})
        if OperatorToken.objects.filter(OperatorToken.usable(), user_id=self.user_id).count() >= MAX_ACTIVE:
            raise ValidationError(f"This user has {MAX_ACTIVE} tokens in use; revoke one first.")

    @property
    def shown(self) -> str:
        """The part that may be shown."""
        return f"pso-{self.prefix}-…"

    @property
    def active(self) -> bool:
        """Whether calls with this token are let in, where the user's account is active."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > timezone.now())

    @staticmethod
    def usable() -> Q:
        """The same as a condition of the database."""
        return Q(revoked_at=None, user__is_active=True) & (Q(expires_at=None) | Q(expires_at__gt=timezone.now()))
