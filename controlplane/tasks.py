"""Periodic tasks of the ops worker that need the API's own code."""

import logging
from functools import cache

from celery import shared_task
from django.conf import settings
from django.db import Error as DatabaseError
from redis.exceptions import RedisError

from controlplane.models import Batch
from controlplane.offline.files import ACTIVE, remove_orphans
from controlplane.offline.runner import RunnerThread
from inference.alone import alone
from inference.gateway.errors import GatewayError

logger = logging.getLogger(__name__)

STEP_S = 30.0


@shared_task(ignore_result=True)
@alone
def run_offline_work() -> None:
    """Move batches on, if there are any."""
    try:
        if Batch.objects.filter(status__in=ACTIVE).exists():
            _runner().step(STEP_S)
    except (RedisError, DatabaseError, OSError, GatewayError) as error:
        logger.warning("Offline work waits: %s", error)


@shared_task(ignore_result=True)
@alone
def remove_orphaned_files() -> None:
    """Delete what is left of files that nobody can reach."""
    try:
        if num := remove_orphans():
            logger.info("Deleted %d files that belonged to nobody.", num)
    except (DatabaseError, OSError) as error:
        logger.warning("Orphaned files are deleted later: %s", error)


@cache
def _runner() -> RunnerThread:
    """One for the life of the process."""
    return RunnerThread(settings.PENSTOCK)
