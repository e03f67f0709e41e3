"""The Celery app: periodic tasks of the ops worker; the engine and its control command in gpu workers.

A gpu worker is started as `celery -A controlplane worker -n gpu.NAME@%h --pool threads --concurrency 1`, the ops worker
as `celery -A controlplane worker -n ops@%h -Q ops -B`.
"""

import os
import signal
import sys

from celery import Celery
from celery.signals import beat_embedded_init
from django.conf import settings

from controlplane.child import die_with_parent
from controlplane.config import Config
from inference.worker.bootstep import EngineStep
from inference.worker.supervisor import SupervisorOptions

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "controlplane.settings")

app = Celery("penstock")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


class ConfiguredEngineStep(EngineStep):
    """The engine of this worker, as the settings have it."""

    def options(self, replica: str) -> SupervisorOptions:
        """From PENSTOCK_*; the engine process itself reads no environment."""
        config: Config = settings.PENSTOCK
        return SupervisorOptions(
            command=[sys.executable, "-m", "inference.worker"],
            upstream_command=[sys.executable, "-m", "inference.upstream"],
            replica=replica,
            redis_url=config.redis,
            key_prefix=config.key_prefix,
            model=config.model,
            device=config.device,
            lease_s=config.lease_s,
            drain_s=config.drain_s,
            log_level=config.log_level,
            log_format=config.log_format,
            gpu=config.gpu,
            step_timeout_s=config.step_timeout_s,
            load_timeout_s=config.load_timeout_s,
        )


app.steps["worker"].add(ConfiguredEngineStep)


@beat_embedded_init.connect
def end_beat_with_worker(**_: object) -> None:
    """Beat is a process of its own; without this it outlives a killed ops worker and doubles its successor's work."""
    die_with_parent(signal.SIGKILL, os.getppid())
