"""History in larger grains, for charts and service levels over days: sums of minutes and of hours."""

from django.db import models

import dashboard.alerts.models  # noqa: F401  (Django finds an app's models here)
from scheduling.models import PolicyRevision, PriorityLevel


class Resolution(models.IntegerChoices):
    """Length of a grain in seconds. Seconds themselves are the rows of BatchRecord."""

    MINUTE = 60
    HOUR = 3600


class Grain(models.Model):
    """What the sums of a model over one grain have in common. Whoever adds to them moves a RollupCheckpoint with it."""

    resolution = models.PositiveSmallIntegerField(choices=Resolution.choices)
    start = models.DateTimeField()
    model = models.CharField(max_length=128)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self.model}, {self.resolution} s from {self.start:%Y-%m-%d %H:%M}"


class RequestRollup(Grain):
    """Requests of a tenant and priority that ended, or were refused for want of capacity, within a grain."""

    tenant = models.CharField(max_length=63)
    priority = models.PositiveSmallIntegerField(choices=PriorityLevel.choices)
    finished = models.PositiveIntegerField(default=0)
    failed = models.PositiveIntegerField(default=0)
    cancelled = models.PositiveIntegerField(default=0)
    refused = models.PositiveIntegerField("refused for want of capacity", default=0)
    judged = models.PositiveIntegerField("with a service level", default=0)
    met = models.PositiveIntegerField("within their service level", default=0)
    allowed = models.FloatField("misses that the objective allows", default=0)
    prompt_tokens = models.PositiveBigIntegerField(default=0)
    completion_tokens = models.PositiveBigIntegerField(default=0)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["resolution", "start", "model", "tenant", "priority"], name="dashboard_requestrollup_grain"
            )
        ]
        indexes = [models.Index(fields=["resolution", "model", "start"], name="dashboard_requestrollup_model")]


class LatencyRollup(Grain):
    """How long requests that ended within a grain took: counts per bucket of LATENCY_BUCKETS_S and one for the rest."""

    queue = models.JSONField(default=list)
    ttft = models.JSONField(default=list)
    tpot = models.JSONField(default=list)
    e2e = models.JSONField(default=list)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["resolution", "model", "start"], name="dashboard_latencyrollup_grain")
        ]


class BatchRollup(Grain):
    """What a replica computed within a grain, and what its device said."""

    replica = models.CharField(max_length=128)
    seconds = models.PositiveIntegerField(default=0)
    steps = models.PositiveBigIntegerField(default=0)
    sequence_steps = models.FloatField("steps times batch size", default=0)
    step_ms = models.FloatField("time in steps (ms)", default=0)
    batch_size_max = models.PositiveIntegerField(default=0)
    step_ms_max = models.FloatField(default=0)
    prompt_tokens = models.PositiveBigIntegerField(default=0)
    output_tokens = models.PositiveBigIntegerField(default=0)
    preemptions = models.PositiveIntegerField(default=0)
    kv_used = models.FloatField("share of KV blocks, summed over seconds", default=0)
    utilization = models.FloatField("percent, summed over told", default=0)
    utilization_told = models.PositiveIntegerField(default=0)
    memory = models.FloatField("bytes, summed over told", default=0)
    memory_told = models.PositiveIntegerField(default=0)
    power = models.FloatField("watts, summed over told", default=0)
    power_told = models.PositiveIntegerField(default=0)
    temperature_max = models.FloatField(default=0)
    throttled = models.PositiveIntegerField("seconds throttled", default=0)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["resolution", "start", "model", "replica"], name="dashboard_batchrollup_grain"
            )
        ]
        indexes = [models.Index(fields=["resolution", "model", "start"], name="dashboard_batchrollup_model")]


class RefusalRollup(Grain):
    """Requests of a tenant that were refused within a grain, by reason."""

    tenant = models.CharField(max_length=63)
    reason = models.CharField(max_length=63)
    num = models.PositiveIntegerField(default=0)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["resolution", "start", "model", "tenant", "reason"], name="dashboard_refusalrollup_grain"
            )
        ]


class RefusalCount(models.Model):
    """A counter of refusals as it was read last: the queue's store only counts up, and may lose its data."""

    name = models.CharField(
        max_length=300, primary_key=True, help_text="model|tenant|reason; model|tenant|priority of the turned away."
    )
    num = models.PositiveBigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.name}: {self.num}"


class RollupCheckpoint(models.Model):
    """How far a table of history has been summed up. It moves in the transaction that adds to the sums."""

    source = models.CharField(max_length=32, primary_key=True)
    last_id = models.BigIntegerField(default=0)
    updated_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"{self.source} up to {self.last_id}"


class WhatIfRun(models.Model):
    """A replay of recorded traffic under other policies: asked for by an operator, run by the ops worker."""

    class State(models.TextChoices):
        """`failed` says why in `error`."""

        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"

    model = models.CharField(max_length=128)
    start = models.DateTimeField()
    end = models.DateTimeField()
    candidates = models.JSONField(help_text="Policies and the parameters that differ from their defaults.")
    actor_name = models.CharField("by", max_length=150)
    state = models.CharField(max_length=16, choices=State.choices, default=State.QUEUED)
    progress = models.FloatField(default=0.0)
    under_way = models.CharField(max_length=100, blank=True)
    result = models.JSONField(null=True)
    error = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["model", "-id"], name="dashboard_whatif_model"),
            models.Index(fields=["state"], name="dashboard_whatif_state"),
        ]

    def __str__(self) -> str:
        return f"what-if {self.pk} of {self.model}"


class GuardedSwitch(models.Model):
    """A watch over a new policy revision: where a figure gets worse than a threshold, the former policy comes back."""

    class State(models.TextChoices):
        """`kept`: the watch ended well. `superseded`: somebody switched meanwhile."""

        WATCHING = "watching"
        KEPT = "kept"
        ROLLED_BACK = "rolled back"
        SUPERSEDED = "superseded"

    model = models.CharField(max_length=128)
    revision = models.PositiveIntegerField()
    row = models.ForeignKey(
        PolicyRevision,
        on_delete=models.SET_NULL,
        null=True,
        related_name="+",
        help_text="The revision itself: its number grows where Redis is ahead of the database.",
    )
    metric = models.CharField(max_length=32)
    threshold = models.FloatField()
    watch_s = models.PositiveIntegerField()
    state = models.CharField(max_length=16, choices=State.choices, default=State.WATCHING)
    started_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    before = models.JSONField(default=dict, help_text="Figures of as long a time before the switch.")
    after = models.JSONField(default=dict, help_text="The same since the switch.")
    verdict = models.TextField(blank=True)
    rolled_back_to = models.PositiveIntegerField(null=True, help_text="Revision that brought the former policy back.")

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["state"], name="dashboard_guard_state")]
        constraints = [models.UniqueConstraint(fields=["model", "revision"], name="dashboard_guard_revision")]

    def __str__(self) -> str:
        return f"guard of {self.model} r{self.revision}"
