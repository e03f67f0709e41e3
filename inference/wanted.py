"""Which replicas operators want, where, and what they told each: the desired state that machines reconcile with."""

import re

from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models

from inference.plan import PlannedReplica

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
REPLICA_NAME = RegexValidator(
    rf"\A{NAME.pattern}\Z", "A replica's name has up to 64 letters, digits, and the characters _ and -."
)
DEVICE = RegexValidator(
    r"\A(auto|cpu|cuda(:\d+)?|(GPU|MIG)-[0-9A-Za-z/-]{1,100})\Z",
    "A device is auto, cpu, cuda, cuda:N, or the UUID of a GPU (GPU-... or MIG-...).",
)
MAX_DRAIN_S = 3600.0


def is_replica_name(name: str) -> bool:
    """Whether a replica that machines start could be called so."""
    return NAME.fullmatch(name) is not None


class WantedReplica(models.Model):
    """A replica that an operator has added, or one that a machine's settings start and an operator has steered.

    The latter have no deployment: which model they serve is the settings' word.
    """

    class Wanted(models.TextChoices):
        """Whether it should run. One that is stopped leaves the table once its machine runs it no more."""

        RUNNING = "running"
        STOPPED = "stopped"

    name = models.CharField(max_length=64, unique=True, validators=[REPLICA_NAME])
    deployment = models.ForeignKey(
        "inference.ModelDeployment", null=True, blank=True, on_delete=models.CASCADE, related_name="wanted_replicas",
        help_text="Empty: one that its machine's settings start, and that an operator has steered.",
    )  # fmt: skip
    machine = models.CharField(
        max_length=128, blank=True, help_text="Name of the machine whose supervisor runs it (PENSTOCK_MACHINE)."
    )
    device = models.CharField(
        max_length=110, default="auto", validators=[DEVICE],
        help_text="auto, cpu, cuda, cuda:N, or a GPU's UUID; what the machine has stands on the Fleet page.",
    )  # fmt: skip
    wanted = models.CharField(max_length=16, choices=Wanted.choices, default=Wanted.RUNNING)
    generation = models.PositiveIntegerField(
        default=0, help_text="Counted up, it restarts the replica: what runs is drained first."
    )
    drain_s = models.FloatField(
        "drain (s)", null=True, blank=True, validators=[MinValueValidator(0.0), MaxValueValidator(MAX_DRAIN_S)],
        help_text="How long what runs may finish when it is stopped; then it goes back to the queue. "
        "Empty: the machine's PENSTOCK_DRAIN_S.",
    )  # fmt: skip
    commands = models.JSONField(
        default=dict, blank=True, editable=False,
        help_text="What operators told it, by kind: [command, arguments]; a replica that starts anew is told again.",
    )  # fmt: skip
    created_at = models.DateTimeField(auto_now_add=True)
    changed_at = models.DateTimeField(auto_now=True)

    class Meta:
        verbose_name = "wanted replica"
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        """A replica that is to be started needs a machine. Raises ValidationError."""
        if self.deployment_id is not None and not self.machine:
            raise ValidationError({"machine": "Name the machine that is to run it."})

    def to_plan(self) -> PlannedReplica:
        """The row as machines and gpu workers read it. The deployment must have been read with it."""
        return PlannedReplica(
            name=self.name,
            model=self.deployment.name if self.deployment else "",
            machine=self.machine,
            device=self.device,
            wanted=self.wanted,  # type: ignore[arg-type]  # the choices are the literal's
            generation=self.generation,
            drain_s=self.drain_s,
            commands={kind: (command, arguments) for kind, (command, arguments) in self.commands.items()},
            since_s=round(self.changed_at.timestamp(), 3),
        )
