"""Periodic tasks of the ops worker for the pages: repeated by beat, harmless to run twice."""

import logging

from celery import shared_task
from django.conf import settings
from django.db import Error as DatabaseError

from dashboard.models import Resolution
from dashboard.rollups import prune_rollups, roll_up

logger = logging.getLogger(__name__)

ROLL_UP_BUDGET_S = 4.0
"""A run that has caught up ends at once; one that has not leaves the rest to the next."""


@shared_task(ignore_result=True)
def roll_up_history() -> None:
    """Sum new history up into minutes and hours."""
    try:
        roll_up(ROLL_UP_BUDGET_S)
    except (DatabaseError, OSError) as error:
        logger.warning("History is summed up later: %s", error)


@shared_task(ignore_result=True)
def forget_old_rollups() -> None:
    """Delete sums older than the settings say."""
    config = settings.PENSTOCK
    try:
        num = prune_rollups(days={Resolution.MINUTE: config.minutes_days, Resolution.HOUR: config.hours_days})
    except (DatabaseError, OSError) as error:
        logger.warning("Old sums could not be deleted: %s", error)
        return
    if num:
        logger.info("Deleted %d minutes and hours of old history.", num)
