"""Which policy orders a queue, and the revisions that led to it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from scheduling.connection import live_keys, live_redis
from scheduling.core.answers import ActivePolicy
from scheduling.fleet import FleetQueue
from scheduling.models import PolicyRevision
from scheduling.store import execute

log = logging.getLogger(__name__)

MAX_REVISIONS = 100
Changes = list[tuple[str, Any, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """A queue's policy. `confirmed`: the queue itself said so; else it is what the database wants."""

    name: str
    params: Mapping[str, Any]
    revision: int
    confirmed: bool


def find_policy(model: str) -> InForce:
    """The policy of a model's queue; the newest revision's where the queue's store does not answer."""
    try:
        active: ActivePolicy = execute(live_redis(), FleetQueue(live_keys(), model).active_policy())
        return InForce(name=active.name, params=dict(active.params), revision=active.revision, confirmed=True)
    except (RedisError, OSError) as error:
        log.warning("The queue of %s cannot be asked for its policy: %s", model, error)
    newest = PolicyRevision.objects.filter(model=model).order_by("-revision").first()
    if newest is None:
        return InForce(name="fifo", params={}, revision=0, confirmed=False)
    return InForce(name=newest.name, params=newest.params, revision=newest.revision, confirmed=False)


def list_revisions(model: str, *, before: int | None = None, limit: int = 20) -> tuple[list[PolicyRevision], bool]:
    """Revisions of a model, newest first, those below `before`; and whether there are older ones."""
    limit = min(limit, MAX_REVISIONS)
    rows = PolicyRevision.objects.filter(model=model).order_by("-revision")
    if before is not None:
        rows = rows.filter(revision__lt=before)
    found = list(rows[: limit + 1])
    return found[:limit], len(found) > limit


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    """(name, old, new) of what differs; None where a side has no such name."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [(name, before.get(name), after.get(name)) for name in names]
