"""Periodic tasks of the ops worker. Each is repeated by beat, harmless to run twice, and catches up after an outage."""

import logging
from collections.abc import Callable
from functools import cache, partial

from celery import shared_task
from django.conf import settings
from django.db import Error as DatabaseError
from redis.exceptions import RedisError

from inference import replicas, services
from inference.alone import alone
from inference.control import send_control
from inference.historian import Historian
from inference.messages import HistoryEvent, RequestEvent
from inference.sweeper import Sweeper
from inference.traces import open_tracer, trace_event
from scheduling import policy_switch
from scheduling.adaptation import Adaptation
from scheduling.connection import live_keys, live_redis
from scheduling.models import Tenant
from scheduling.selectors import find_weights

logger = logging.getLogger(__name__)

HISTORY_BUDGET_S = 5.0
"""A run that has caught up ends at once; one that has not leaves the rest to the next."""

AWAY = (RedisError, DatabaseError, OSError)
"""Outages: said in one line, and tried again by the next run."""


@shared_task(ignore_result=True)
@alone
def write_history() -> None:
    """Move history from Redis into the database."""
    try:
        Historian(live_redis(), live_keys(), observe=_tracing()).drain(HISTORY_BUDGET_S)
    except AWAY as error:
        logger.warning("History waits in its stream: %s", error)


@shared_task(ignore_result=True)
@alone
def sweep() -> None:
    """Give back what dead engine and web processes held."""
    try:
        _sweeper().run_once()
    except AWAY as error:
        logger.warning("Sweeping waits for Redis: %s", error)


@shared_task(ignore_result=True)
@alone
def free_slots() -> None:
    """Give back concurrency slots that no request holds."""
    try:
        _sweeper().free_slots(Tenant.objects.values_list("name", flat=True))
    except AWAY as error:
        logger.warning("Concurrency slots could not be compared: %s", error)


@shared_task(ignore_result=True)
@alone
def reconcile_policies() -> None:
    """Make every queue follow its newest policy revision."""
    try:
        policy_switch.reconcile_policies(announce=partial(services.announce_policy, send=send_control))
    except AWAY as error:
        logger.warning("Policies could not be compared: %s", error)


@shared_task(ignore_result=True)
@alone
def adapt_policies() -> None:
    """Where `adaptive` is in force, choose what fits what waits."""
    try:
        _adaptation().run_once(announce=partial(services.announce_policy, send=send_control))
    except AWAY as error:
        logger.warning("Adapting waits: %s", error)


@shared_task(ignore_result=True)
@alone
def publish_deployments() -> None:
    """Bring the deployments in Redis up to date, after Redis was away or lost its data."""
    try:
        services.publish()
    except AWAY as error:
        logger.warning("Deployments could not be published: %s", error)


@shared_task(ignore_result=True)
@alone
def record_replicas() -> None:
    """Keep the table of replicas up to date, and drop what was removed and runs no more."""
    try:
        client, keys = live_redis(), live_keys()
        services.record_replicas(client, keys)
        replicas.forget_removed(replicas.read_machines(client, keys), replicas.read_plan(client, keys))
    except AWAY as error:
        logger.warning("Replicas could not be recorded: %s", error)


@shared_task(ignore_result=True)
@alone
def prune_history() -> None:
    """Delete history older than the setting says."""
    try:
        num_deleted = services.prune_history(days=settings.PENSTOCK.history_days)
    except AWAY as error:
        logger.warning("History could not be pruned: %s", error)
        return
    if num_deleted:
        logger.info("Deleted %d history rows older than %d days.", num_deleted, settings.PENSTOCK.history_days)


def _tracing() -> Callable[[HistoryEvent], None] | None:
    """What makes traces of events, where they are wanted."""
    tracer = open_tracer(settings.PENSTOCK.traces)
    if tracer is None:
        return None
    return lambda event: trace_event(tracer, event) if isinstance(event, RequestEvent) else None


@cache
def _adaptation() -> Adaptation:
    """One for the life of the process: it remembers what the queues showed."""
    return Adaptation(live_redis(), live_keys())


@cache
def _sweeper() -> Sweeper:
    """One for the life of the process: it remembers models that were withdrawn."""
    return Sweeper(live_redis(), live_keys(), weights=_weights)


def _weights() -> dict[str, float]:
    """Nobody waits for a database that is away: then requests have the weights that they came with."""
    try:
        return find_weights()
    except DatabaseError as error:
        logger.warning("The weights of tenants could not be read: %s", error)
        return {}
