"""Who may send what, which policy orders a queue, and who changed what: desired state and its audit trail."""

from typing import Any, NoReturn

from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import Q

from scheduling.core.request import Priority

TENANT_NAME = RegexValidator(
    r"^[a-z0-9][a-z0-9_-]{0,62}$",
    "A tenant's name has up to 63 lower-case letters, digits, - and _, and begins with a letter or digit.",
)

AT_LEAST_ONE = MinValueValidator(1, "A limit is at least 1; leave the field empty for no limit.")


class PriorityLevel(models.IntegerChoices):
    """The six levels, as forms show them."""

    CRITICAL = Priority.CRITICAL, "critical"
    REALTIME = Priority.REALTIME, "realtime"
    HIGH = Priority.HIGH, "high"
    NORMAL = Priority.NORMAL, "normal"
    LOW = Priority.LOW, "low"
    BULK = Priority.BULK, "bulk"


def _at_least_one(field: str, what: str) -> models.CheckConstraint:
    return models.CheckConstraint(
        condition=Q(**{f"{field}__isnull": True}) | Q(**{f"{field}__gte": 1}),
        name=f"scheduling_quota_{field}_positive",
        violation_error_message=f"{what} must be at least 1; leave the field empty for no limit.",
    )


class Tenant(models.Model):
    """A team that sends requests."""

    name = models.CharField(
        max_length=63,
        unique=True,
        validators=[TENANT_NAME],
        help_text="Used in limits, metrics and history; cannot be changed.",
    )
    display_name = models.CharField(max_length=120, blank=True)
    weight = models.FloatField(
        default=1.0,
        validators=[
            MinValueValidator(0.01, "A weight is at least 0.01."),
            MaxValueValidator(1000, "A weight is at most 1000."),
        ],
        help_text="Share of the fleet under the fair policy, relative to the other tenants.",
    )
    suspended = models.BooleanField(default=False, help_text="Requests of a suspended tenant are refused with 403.")
    drop_expired = models.BooleanField(
        "drop expired requests",
        default=False,
        help_text="A request that still waits when its deadline passes is answered with 504. The deadline is the "
        "request's own, or the end-to-end target of its priority.",
    )
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ["name"]
        constraints = [
            models.CheckConstraint(
                condition=Q(weight__gte=0.01, weight__lte=1000),
                name="scheduling_tenant_weight_range",
                violation_error_message="A weight lies between 0.01 and 1000.",
            )
        ]

    def __str__(self) -> str:
        return self.display_name or self.name

    @property
    def audit_name(self) -> str:
        """What the audit trail calls it: the display name changes, and several may share one."""
        return self.name


class Quota(models.Model):
    """What a tenant may use; an empty field means no limit."""

    tenant = models.OneToOneField(Tenant, on_delete=models.CASCADE, related_name="quota")
    rpm = models.PositiveIntegerField("requests per minute", null=True, blank=True, validators=[AT_LEAST_ONE])
    tpm = models.PositiveIntegerField(
        "tokens per minute",
        null=True,
        blank=True,
        validators=[AT_LEAST_ONE],
        help_text="Prompt and completion tokens together.",
    )
    tpd = models.PositiveBigIntegerField(
        "tokens per day",
        null=True,
        blank=True,
        validators=[AT_LEAST_ONE],
        help_text="Prompt and completion tokens together; a day begins at midnight UTC.",
    )
    concurrency = models.PositiveIntegerField("concurrent requests", null=True, blank=True, validators=[AT_LEAST_ONE])
    max_priority = models.PositiveSmallIntegerField(
        "highest priority",
        choices=PriorityLevel.choices,
        default=PriorityLevel.HIGH,
        help_text="No request of this tenant may ask for more.",
    )

    class Meta:
        constraints = [
            _at_least_one("rpm", "Requests per minute"),
            _at_least_one("tpm", "Tokens per minute"),
            _at_least_one("tpd", "Tokens per day"),
            _at_least_one("concurrency", "Concurrent requests"),
            models.CheckConstraint(
                condition=Q(max_priority__lte=Priority.BULK),
                name="scheduling_quota_max_priority_level",
                violation_error_message="The highest priority is one of the six levels, 0 (critical) to 5 (bulk).",
            ),
        ]

    def __str__(self) -> str:
        return f"quota of {self.tenant}"

    @property
    def audit_name(self) -> str:
        """Its tenant's."""
        return self.tenant.name


class ApiKey(models.Model):
    """A tenant's key. The key itself is shown once and never stored: only its SHA-256 digest and its beginning."""

    tenant = models.ForeignKey(Tenant, on_delete=models.CASCADE, related_name="keys")
    name = models.CharField(max_length=120, default="default")
    prefix = models.CharField(max_length=16, db_index=True, editable=False)
    digest = models.CharField(max_length=64, unique=True, editable=False)
    max_priority = models.PositiveSmallIntegerField(
        "highest priority",
        choices=PriorityLevel.choices,
        null=True,
        blank=True,
        help_text="Empty: the tenant's own ceiling, which holds in any case.",
    )
    created_at = models.DateTimeField(auto_now_add=True)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        verbose_name = "API key"
        verbose_name_plural = "API keys"
        ordering = ["tenant", "-created_at"]
        constraints = [
            models.CheckConstraint(
                condition=Q(max_priority__isnull=True) | Q(max_priority__lte=Priority.BULK),
                name="scheduling_apikey_max_priority_level",
                violation_error_message="The highest priority is one of the six levels, 0 (critical) to 5 (bulk).",
            )
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.shown})"

    @property
    def audit_name(self) -> str:
        """As the audit trail has it."""
        return f"{self.tenant.name}/{self.prefix}"

    @property
    def shown(self) -> str:
        """The part of the key that may be shown."""
        return f"ps-{self.prefix}-…"

    @property
    def active(self) -> bool:
        """Whether requests with this key are let in."""
        return self.revoked_at is None


class ServiceLevel(models.Model):
    """Latency targets of a priority level, for one tenant or for all that have none of their own."""

    tenant = models.ForeignKey(
        Tenant, on_delete=models.CASCADE, null=True, blank=True, related_name="service_levels",
        help_text="Empty: the default for all tenants.",
    )  # fmt: skip
    priority = models.PositiveSmallIntegerField(choices=PriorityLevel.choices, default=PriorityLevel.NORMAL)
    ttft_ms = models.PositiveIntegerField("time to first token (ms)", null=True, blank=True)
    e2e_ms = models.PositiveIntegerField("end to end (ms)", null=True, blank=True)
    tpot_ms = models.PositiveIntegerField("time per output token (ms)", null=True, blank=True)
    objective_percent = models.FloatField(
        "objective (%)",
        default=99.0,
        validators=[
            MinValueValidator(1, "An objective is at least 1 %."),
            MaxValueValidator(99.999, "An objective is at most 99.999 %: some misses must be allowed."),
        ],
        help_text="Share of requests that should meet the targets; the rest is the error budget.",
    )

    class Meta:
        verbose_name = "latency target"
        ordering = ["tenant__name", "priority"]
        constraints = [
            models.UniqueConstraint(
                fields=["tenant", "priority"],
                name="scheduling_servicelevel_tenant_priority",
                violation_error_message="This tenant has targets for this priority already.",
            ),
            models.UniqueConstraint(
                fields=["priority"],
                condition=Q(tenant__isnull=True),
                name="scheduling_servicelevel_default_priority",
                violation_error_message="There are default targets for this priority already.",
            ),
            models.CheckConstraint(
                # A comparison with NULL is not false, and a check passes unless it is.
                condition=(Q(ttft_ms__isnull=False) | Q(e2e_ms__isnull=False) | Q(tpot_ms__isnull=False))
                & (Q(ttft_ms__isnull=True) | Q(ttft_ms__gte=1))
                & (Q(e2e_ms__isnull=True) | Q(e2e_ms__gte=1))
                & (Q(tpot_ms__isnull=True) | Q(tpot_ms__gte=1)),
                name="scheduling_servicelevel_some_target",
                violation_error_message="Give at least one target, in milliseconds, of 1 or more.",
            ),
            models.CheckConstraint(
                condition=Q(priority__lte=Priority.BULK),
                name="scheduling_servicelevel_priority_level",
                violation_error_message="A priority is one of the six levels, 0 (critical) to 5 (bulk).",
            ),
        ]

    def __str__(self) -> str:
        return f"{PriorityLevel(self.priority).label} of {self.tenant or 'everybody'}"

    @property
    def audit_name(self) -> str:
        """As the audit trail has it; no tenant's name has a space."""
        owner = self.tenant.name if self.tenant else "all tenants"
        return f"{owner}/{PriorityLevel(self.priority).label}"


class PolicyRevision(models.Model):
    """One switch of a model's queue to a policy: who, when, from, to, why, and how it went."""

    class State(models.TextChoices):
        """`pending`: wanted, not in force yet (Redis was away); the reconciler applies it."""

        APPLYING = "applying"
        PENDING = "pending"
        APPLIED = "applied"
        SUPERSEDED = "superseded"

    model = models.CharField(max_length=128)
    revision = models.PositiveIntegerField()
    name = models.CharField("policy", max_length=63)
    params = models.JSONField(default=dict, blank=True, encoder=DjangoJSONEncoder)
    previous_name = models.CharField("previous policy", max_length=63, blank=True)
    previous_params = models.JSONField(default=dict, blank=True, encoder=DjangoJSONEncoder)
    actor = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    actor_name = models.CharField("by", max_length=150, blank=True)
    reason = models.TextField(blank=True)
    state = models.CharField(max_length=16, choices=State.choices, default=State.APPLYING)
    created_at = models.DateTimeField(auto_now_add=True)
    applied_at = models.DateTimeField(null=True, blank=True)
    num_moved = models.PositiveIntegerField("requests moved", null=True, blank=True)
    seconds = models.FloatField("time taken (s)", null=True, blank=True)
    acknowledgements = models.JSONField(default=dict, blank=True, encoder=DjangoJSONEncoder)
    error = models.TextField(blank=True)

    class Meta:
        verbose_name = "policy switch"
        verbose_name_plural = "policy switches"
        ordering = ["-created_at", "-id"]
        indexes = [models.Index(fields=["state"], name="scheduling_revision_state")]
        constraints = [
            models.UniqueConstraint(fields=["model", "revision"], name="scheduling_policyrevision_model_revision"),
            models.CheckConstraint(
                condition=Q(revision__gte=1),
                name="scheduling_policyrevision_from_one",
                violation_error_message="Revisions count from 1; 0 is the policy of a queue that nobody touched.",
            ),
        ]
        permissions = [("switch_policy", "Can switch the policy of a queue")]

    def __str__(self) -> str:
        return f"{self.model} r{self.revision}: {self.name}"


class ConfigVersion(models.Model):
    """A single row that counts the changes to tenants, keys, quotas and deployments."""

    id = models.PositiveSmallIntegerField(primary_key=True, default=1, editable=False)
    version = models.BigIntegerField(default=0)

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(id=1), name="scheduling_configversion_single_row")]

    def __str__(self) -> str:
        return f"configuration version {self.version}"


class AppendOnlyQuerySet(models.QuerySet[Any]):
    """Rows that can be added and read, and nothing else."""

    def update(self, **kwargs: Any) -> NoReturn:
        """Raises TypeError."""
        raise TypeError("Rows of the audit trail are never changed.")

    def delete(self) -> NoReturn:
        """Raises TypeError."""
        raise TypeError("Rows of the audit trail are never deleted.")


class OperatorAction(models.Model):
    """The audit trail: one row per change that a person or a command made. Rows are only ever added.

    The database holds that, by triggers (migration 0007): a migration that makes the table anew makes them anew, too.
    """

    actor = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.SET_NULL, null=True, blank=True, related_name="+"
    )
    actor_name = models.CharField("by", max_length=150, blank=True)
    action = models.CharField(max_length=63)
    target = models.CharField(max_length=200)
    before = models.JSONField(default=dict, blank=True, encoder=DjangoJSONEncoder)
    after = models.JSONField(default=dict, blank=True, encoder=DjangoJSONEncoder)
    reason = models.TextField(blank=True)
    address = models.CharField(
        "from", max_length=64, blank=True, help_text="The browser's address; empty for commands and periodic tasks."
    )
    token = models.CharField(
        max_length=16, blank=True, help_text="The beginning of the operator's token that was used; empty for a session."
    )
    created_at = models.DateTimeField("when", auto_now_add=True)

    objects = models.Manager.from_queryset(AppendOnlyQuerySet)()

    class Meta:
        verbose_name = "operator's action"
        verbose_name_plural = "audit trail"
        ordering = ["-created_at", "-id"]
        indexes = [
            models.Index(fields=["-created_at"], name="scheduling_action_created"),
            models.Index(fields=["target", "-created_at"], name="scheduling_action_target"),
            models.Index(fields=["action", "-created_at"], name="scheduling_action_action"),
            models.Index(fields=["actor_name", "-created_at"], name="scheduling_action_actor"),
        ]

    def __str__(self) -> str:
        return f"{self.action} {self.target}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Insert. A row that exists is never written again."""
        kwargs["force_insert"] = True
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises TypeError: the trail is only ever added to."""
        raise TypeError("Rows of the audit trail are never deleted.")

    @property
    def shown_origin(self) -> str:
        """From where: the address, and the token where one was used."""
        return f"{self.address}, token {self.token}" if self.token else self.address
