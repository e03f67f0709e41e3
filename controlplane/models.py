"""Tokens by which operators' scripts call the native API; files and batches of tenants' offline work."""

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
        verbose_name = "API token"
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
    def audit_name(self) -> str:
        """As the audit trail has it."""
        return f"{self.user.get_username()}/{self.prefix}"

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


class StoredFile(models.Model):
    """A tenant's file; its content lies in the folder of files, under its id."""

    id = models.CharField(max_length=64, primary_key=True)
    tenant = models.CharField(max_length=63)
    filename = models.CharField(max_length=255)
    purpose = models.CharField(max_length=32)
    num_bytes = models.PositiveBigIntegerField("bytes")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at", "-id"]
        indexes = [models.Index(fields=["tenant", "-created_at"], name="controlplane_file_tenant")]

    def __str__(self) -> str:
        return self.filename


class Batch(models.Model):
    """Offline work of a tenant, in OpenAI's states."""

    class Status(models.TextChoices):
        """`failed` means that its file could not be used; requests that fail alone are counted."""

        VALIDATING = "validating"
        IN_PROGRESS = "in_progress"
        FINALIZING = "finalizing"
        COMPLETED = "completed"
        FAILED = "failed"
        EXPIRED = "expired"
        CANCELLING = "cancelling"
        CANCELLED = "cancelled"

    id = models.CharField(max_length=64, primary_key=True)
    tenant = models.CharField(max_length=63)
    endpoint = models.CharField(max_length=64)
    input_file_id = models.CharField(max_length=64)
    output_file_id = models.CharField(max_length=64, blank=True)
    error_file_id = models.CharField(max_length=64, blank=True)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.VALIDATING)
    num_total = models.PositiveIntegerField(default=0)
    num_completed = models.PositiveIntegerField(default=0)
    num_failed = models.PositiveIntegerField(default=0)
    metadata = models.JSONField(default=dict)
    errors = models.JSONField(default=list)
    moments = models.JSONField(default=dict)
    """Status -> unix time at which it was reached."""
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()

    class Meta:
        ordering = ["-created_at", "-id"]
        verbose_name_plural = "batches"
        indexes = [
            models.Index(fields=["tenant", "-created_at"], name="controlplane_batch_tenant"),
            models.Index(fields=["status"], name="controlplane_batch_status"),
        ]

    def __str__(self) -> str:
        return self.id


class BatchLine(models.Model):
    """One request of a batch, until the batch has ended."""

    class State(models.TextChoices):
        """`submitted` is in the queue or runs, under an id that is made from batch and number."""

        PENDING = "pending"
        SUBMITTED = "submitted"
        COMPLETED = "completed"
        FAILED = "failed"

    batch = models.ForeignKey(Batch, on_delete=models.CASCADE, related_name="lines")
    number = models.PositiveIntegerField()
    custom_id = models.CharField(max_length=256)
    body = models.TextField()
    state = models.CharField(max_length=16, choices=State.choices, default=State.PENDING)
    num_shed = models.PositiveSmallIntegerField(default=0)
    """How often it had to leave the queue for others."""
    status_code = models.PositiveSmallIntegerField(default=0)
    answer = models.TextField(blank=True)

    class Meta:
        ordering = ["number"]
        constraints = [
            models.UniqueConstraint(fields=["batch", "number"], name="controlplane_batchline_number"),
            models.UniqueConstraint(fields=["batch", "custom_id"], name="controlplane_batchline_custom_id"),
        ]
        indexes = [models.Index(fields=["batch", "state"], name="controlplane_batchline_state")]

    def __str__(self) -> str:
        return self.custom_id

    @property
    def request_id(self) -> str:
        """The same whatever is repeated, so that a request is in the queue once; another after it was shed."""
        first = f"{self.batch_id}-{self.number}"
        return f"{first}-{self.num_shed}" if self.num_shed else first
