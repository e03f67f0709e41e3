"""Switching the policy of a model's queue: written down first, then done, and done again until Redis has it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import redis
from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import Max
from django.utils import timezone
from redis.exceptions import LockError, RedisError

from scheduling.audit import name_actor, record_action
from scheduling.connection import live_keys, live_redis
from scheduling.core.policies import Policy, build_policy
from scheduling.fleet import ActivePolicy, FleetQueue
from scheduling.keys import Keys
from scheduling.models import ConfigVersion, PolicyRevision
from scheduling.selectors import find_weights
from scheduling.store import execute
from scheduling.switch import StaleRevision, SwitchError
from scheduling.switch import switch_policy as switch_queue

logger = logging.getLogger(__name__)

Announce = Callable[[PolicyRevision], Mapping[str, Any]]
"""Tells the gpu workers of a model about a revision and gives their acknowledgements by replica."""

LOCK_S = 30.0
"""A switch is over well before this; who died in the middle of one gives way then."""

State = PolicyRevision.State


def switch_policy(
    *,
    model: str,
    name: str,
    params: Mapping[str, Any] | None = None,
    actor: User | None = None,
    actor_name: str = "",
    reason: str = "",
    announce: Announce | None = None,
    after: int | None = None,
    on_written: Callable[[PolicyRevision], object] | None = None,
    client: redis.Redis | None = None,
    keys: Keys | None = None,
) -> PolicyRevision:
    """Order a model's queue by another policy from now on.

    The revision's row is committed before Redis is touched. Where Redis fails in between, the row comes back `pending`
    and the reconciler applies it later; where a later revision overtook it, `superseded`. `actor_name` is kept where no
    user acts. `on_written` is called in the transaction of the row, for what must be written with it or not at all.
    Raises PolicyError for an unknown policy or parameter, StaleRevision where `after` is given and is not the newest
    revision (any more).
    """
    policy = build_policy(name, params)
    client, keys = client or live_redis(), keys or live_keys()
    queue = FleetQueue(keys, model)
    active = _ask_active(client, queue)
    with transaction.atomic():
        revision = _write_revision(
            model=model, policy=policy, active=active, actor=actor, actor_name=actor_name, reason=reason, after=after
        )
        if on_written is not None:
            on_written(revision)
    return apply_revision(revision=revision, announce=announce, client=client, keys=keys)


def apply_revision(
    *, revision: PolicyRevision, announce: Announce | None, client: redis.Redis, keys: Keys
) -> PolicyRevision:
    """Bring a revision into force unless it is already, or a later one is; never raises for a Redis that is away."""
    queue = FleetQueue(keys, revision.model)
    try:
        with _switching(client, queue):
            revision.refresh_from_db()
            if revision.state == State.SUPERSEDED or _overtaken(revision):
                return _save(revision, state=State.SUPERSEDED)
            _bring_into_force(client, queue, revision)
            _supersede_older(revision)
    except (RedisError, OSError, SwitchError) as error:
        logger.warning("Revision %s waits for Redis: %s", revision, error)
        return _save(revision, state=State.PENDING, error=str(error) or type(error).__name__)
    return _announce(revision, announce)


def reconcile_policies(
    *, announce: Announce | None = None, client: redis.Redis | None = None, keys: Keys | None = None
) -> int:
    """Make every queue follow its newest revision; how many had to be changed.

    Applies what is pending, ends what a dying process left `applying`, and restores the policy of a Redis that lost its
    data.
    """
    client, keys = client or live_redis(), keys or live_keys()
    num_changed = 0
    for revision in newest_revisions():
        active = execute(client, FleetQueue(keys, revision.model).active_policy())
        in_force = active.revision >= revision.revision
        if in_force and revision.state == State.APPLIED:
            continue
        if revision.state == State.APPLYING and timezone.now() - revision.created_at < timedelta(seconds=LOCK_S):
            continue  # its own process is at it
        apply_revision(revision=revision, announce=announce, client=client, keys=keys)
        num_changed += 1
    return num_changed


def _ask_active(client: redis.Redis, queue: FleetQueue) -> ActivePolicy | None:
    try:
        return execute(client, queue.active_policy())
    except (RedisError, OSError) as error:
        logger.warning("Redis does not answer (%s); the switch of %s will wait for it.", error, queue.model)
        return None


@transaction.atomic
def _write_revision(
    *,
    model: str,
    policy: Policy,
    active: ActivePolicy | None,
    actor: User | None,
    actor_name: str,
    reason: str,
    after: int | None,
) -> PolicyRevision:
    """The next revision and its audit row. The lock makes two operators' revisions follow each other."""
    ConfigVersion.objects.get_or_create(id=1)
    ConfigVersion.objects.select_for_update().get(id=1)
    of_model = PolicyRevision.objects.filter(model=model)
    last: int = of_model.aggregate(last=Max("revision"))["last"] or 0
    if after is not None and last != after:
        raise StaleRevision(f"Revision {last} of {model} came first.")
    previous = of_model.filter(revision=last).first()
    before: dict[str, Any] = {"policy": "fifo", "params": {}}
    if active is not None:
        before = {"policy": active.name, "params": dict(active.params)}
    elif previous is not None:
        before = {"policy": previous.name, "params": previous.params}
    revision = PolicyRevision.objects.create(
        model=model,
        # A database restored from a backup may be behind Redis, and revisions must only ever grow there.
        revision=1 + max(last, active.revision if active else 0),
        name=policy.name,
        params=dict(policy.params),
        previous_name=before["policy"],
        previous_params=before["params"],
        actor=actor,
        actor_name=actor_name or name_actor(actor),
        reason=reason,
    )
    now = {"policy": policy.name, "params": dict(policy.params), "revision": revision.revision}
    record_action(
        actor=actor,
        actor_name=actor_name,
        action="policy.switch",
        target=model,
        before=before,
        after=now,
        reason=reason,
    )
    return revision


@contextmanager
def _switching(client: redis.Redis, queue: FleetQueue) -> Iterator[None]:
    """Only one process at a time switches a queue."""
    lock = client.lock(f"{queue.base}:switching", timeout=LOCK_S, blocking_timeout=LOCK_S)
    if not lock.acquire():
        raise LockError("another switch of this queue has not ended")
    try:
        yield
    finally:
        try:
            lock.release()
        except LockError:
            logger.warning("The switch of %s took longer than %g s.", queue.model, LOCK_S)


def _overtaken(revision: PolicyRevision) -> bool:
    return PolicyRevision.objects.filter(model=revision.model, revision__gt=revision.revision).exists()


def _supersede_older(revision: PolicyRevision) -> None:
    waiting = PolicyRevision.objects.filter(model=revision.model, revision__lt=revision.revision)
    waiting.exclude(state__in=[State.APPLIED, State.SUPERSEDED]).update(state=State.SUPERSEDED)


def _bring_into_force(client: redis.Redis, queue: FleetQueue, revision: PolicyRevision) -> None:
    start_s = time.perf_counter()
    active = execute(client, queue.active_policy())
    if (active.revision, active.name) == (revision.revision, revision.name):
        # Who switched died before writing it down.
        _save(revision, state=State.APPLIED, error="", applied_at=revision.applied_at or timezone.now())
        return
    if active.revision >= revision.revision:
        # Redis was away when this row got its number, and is ahead of a database that came from a backup.
        _save(revision, revision=active.revision + 1)
    policy = build_policy(revision.name, revision.params)
    result = switch_queue(client, queue, policy, revision.revision, weights=find_weights)
    _save(
        revision,
        state=State.APPLIED,
        error="",
        applied_at=timezone.now(),
        num_moved=result.moved,
        seconds=time.perf_counter() - start_s,
    )


def _announce(revision: PolicyRevision, announce: Announce | None) -> PolicyRevision:
    """Ask the workers to confirm. One that does not is still right: each claim tells it the revision in force."""
    if announce is None:
        return revision
    try:
        acknowledgements = dict(announce(revision))
    except Exception:
        logger.exception("The workers of %s could not be told of revision %d.", revision.model, revision.revision)
        return revision
    return _save(revision, acknowledgements=acknowledgements)


def _save(row: PolicyRevision, /, **changes: Any) -> PolicyRevision:
    for name, value in changes.items():
        setattr(row, name, value)
    row.save(update_fields=list(changes))
    return row


def newest_revisions() -> list[PolicyRevision]:
    """Of each model, the revision its queue should follow."""
    newest = PolicyRevision.objects.values("model").annotate(newest=Max("revision")).values_list("model", "newest")
    return [PolicyRevision.objects.get(model=model, revision=revision) for model, revision in newest]
