"""Periodic tasks of the ops worker for the pages: repeated by beat, harmless to run twice."""

import logging
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

from celery import shared_task
from django.conf import settings
from django.db import Error as DatabaseError
from redis.exceptions import RedisError

from dashboard.alerts.courier import Courier
from dashboard.alerts.services import prune_alerts
from dashboard.alerts.watch import watch_alerts
from dashboard.guard import check_guards
from dashboard.models import Resolution
from dashboard.refusals import roll_up_refusals
from dashboard.rollups import prune_rollups, roll_up
from dashboard.what_if import end_lost_runs
from inference.alone import alone
from inference.control import send_control
from inference.services import announce_policy
from scheduling.connection import live_keys, live_redis

logger = logging.getLogger(__name__)

ROLL_UP_BUDGET_S = 4.0
"""A run that has caught up ends at once; one that has not leaves the rest to the next."""
REPLAY_TIMEOUT_S = 900.0
LIFE_S = 60
"""So long after its last periodic task a worker counts as hung."""
ROOT = Path(__file__).resolve().parent.parent


@shared_task(ignore_result=True)
@alone
def roll_up_history() -> None:
    """Sum new history up into minutes and hours."""
    try:
        roll_up(ROLL_UP_BUDGET_S)
        roll_up_refusals()
    except (RedisError, DatabaseError, OSError) as error:
        logger.warning("History is summed up later: %s", error)


@shared_task(ignore_result=True)
@alone
def forget_old_rollups() -> None:
    """Delete sums, and alerts that have resolved, older than the settings say."""
    config = settings.PENSTOCK
    try:
        num = prune_rollups(days={Resolution.MINUTE: config.minutes_days, Resolution.HOUR: config.hours_days})
        num += prune_alerts(days=config.hours_days)
    except (DatabaseError, OSError) as error:
        logger.warning("Old sums could not be deleted: %s", error)
        return
    if num:
        logger.info("Deleted %d minutes and hours of old history.", num)


@shared_task(ignore_result=True)
@alone
def watch_switches() -> None:
    """Turn guarded policies back where their figure got worse, and end watches and replays that are over."""
    try:
        end_lost_runs()
        check_guards(announce=partial(announce_policy, send=send_control))
    except (RedisError, DatabaseError, OSError) as error:
        logger.warning("Guarded switches could not be looked at: %s", error)


@shared_task(ignore_result=True)
@alone
def tell_of_life() -> None:
    """Leave a sign for probes that this worker does what beat sends; it asks no database, which may be away."""
    try:
        live_redis().set(live_keys().ops, "1", ex=LIFE_S)
    except (RedisError, OSError) as error:
        logger.warning("No sign of life could be left: %s", error)


@shared_task(ignore_result=True)
@alone
def judge_alerts() -> None:
    """Evaluate the alert rules."""
    try:
        watch_alerts()
    except (RedisError, DatabaseError, OSError) as error:
        logger.warning("Alert rules could not be evaluated: %s", error)


@shared_task(ignore_result=True)
@alone
def deliver_notices() -> None:
    """Have threads deliver what is due; this one waits for none of them."""
    try:
        _courier().wake()
    except (DatabaseError, OSError) as error:
        logger.warning("Notices of alerts wait: %s", error)


@shared_task(ignore_result=True)
def run_what_if(run_id: int) -> None:
    """Have a replay run: a process of its own leaves this one's time to the historian and the sweeper."""
    command = [sys.executable, "manage.py", "run_what_if", str(run_id)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            process.wait(REPLAY_TIMEOUT_S)
        finally:
            process.kill()
    end_lost_runs()


@cache
def _courier() -> Courier:
    """One for the life of the process: it knows which channels are busy."""
    return Courier()
