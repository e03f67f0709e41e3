"""Writes to tenants, keys and quotas: one transaction each, audited, in force everywhere within a second."""

import logging
from functools import partial
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import F
from django.utils import timezone
from redis.exceptions import RedisError

from scheduling.audit import record_action
from scheduling.connection import live_keys, live_redis
from scheduling.credentials import generate_key
from scheduling.fleet import FleetQueue
from scheduling.models import ApiKey, ConfigVersion, Quota, Tenant
from scheduling.policy_switch import reconcile_policies, switch_policy
from scheduling.store import execute

__all__ = [
    "config_changed",
    "create_key",
    "create_tenant",
    "issue_key",
    "reconcile_policies",
    "resume_tenant",
    "revoke_key",
    "rotate_key",
    "suspend_tenant",
    "switch_policy",
    "update_quota",
    "update_tenant",
    "weight_changed",
]

logger = logging.getLogger(__name__)

QUOTA_FIELDS = ("rpm", "tpm", "tpd", "concurrency", "max_priority")


def config_changed() -> None:
    """Count the configuration up in this transaction, and tell every process once it is committed.

    The row is what counts; Redis only spreads the news sooner, so that a Redis that is away delays it by seconds.
    """
    with transaction.atomic():
        if not ConfigVersion.objects.filter(id=1).update(version=F("version") + 1):
            ConfigVersion.objects.get_or_create(id=1)
            ConfigVersion.objects.filter(id=1).update(version=F("version") + 1)
        transaction.on_commit(_announce_config)


def _announce_config() -> None:
    try:
        live_redis().incr(live_keys().config_version)
    except (RedisError, OSError) as error:
        logger.warning("Redis does not answer (%s); the change takes effect within 5 s instead of 1 s.", error)


@transaction.atomic
def create_tenant(
    *,
    name: str,
    display_name: str = "",
    weight: float = 1.0,
    drop_expired: bool = False,
    actor: User | None = None,
    reason: str = "",
    **quota: Any,
) -> Tenant:
    """A tenant and its quota (`rpm`, `tpm`, `concurrency`, `max_priority`). Raises ValidationError."""
    tenant = Tenant(name=name, display_name=display_name, weight=weight, drop_expired=drop_expired)
    tenant.full_clean()
    tenant.save()
    limits = Quota(tenant=tenant, **quota)
    limits.full_clean()
    limits.save()
    after = {"weight": weight, "drop_expired": drop_expired, **_quota_values(limits)}
    record_action(actor=actor, action="tenant.create", target=name, after=after, reason=reason)
    config_changed()
    return tenant


@transaction.atomic
def update_tenant(*, tenant: Tenant, actor: User | None = None, reason: str = "", **changes: Any) -> Tenant:
    """Change `display_name`, `weight`, `drop_expired`, or limits of the quota. Raises ValidationError."""
    tenant = Tenant.objects.select_for_update().get(pk=tenant.pk)
    quota, _ = Quota.objects.get_or_create(tenant=tenant)
    before: dict[str, Any] = {}
    for name, value in changes.items():
        owner: Tenant | Quota = quota if name in QUOTA_FIELDS else tenant
        before[name] = getattr(owner, name)
        setattr(owner, name, value)
    for changed in (tenant, quota):
        changed.full_clean()
        changed.save()
    record_action(actor=actor, action="tenant.update", target=tenant.name, before=before, after=changes, reason=reason)
    config_changed()
    if "weight" in changes:
        weight_changed(tenant)
    return tenant


def weight_changed(tenant: Tenant) -> None:
    """In the transaction of a change: once it is committed, give what waits of the tenant its new share."""
    transaction.on_commit(partial(_set_weights, tenant.name, tenant.weight))


def _set_weights(tenant: str, weight: float) -> None:
    """In queues where a tenant is a flow. What is enqueued later brings its weight along; a switch asks for all."""
    client, keys = live_redis(), live_keys()
    try:
        for name in client.hkeys(keys.deployments):
            queue = FleetQueue(keys, name.decode() if isinstance(name, bytes) else str(name))
            active = execute(client, queue.active_policy())
            if active.params.get("current", active.name) in ("fair", "hierarchical"):
                execute(client, queue.set_weight(tenant, weight))
    except (RedisError, OSError) as error:
        logger.warning("Redis does not answer (%s); the weight of %s counts for its next requests.", error, tenant)


def update_quota(*, tenant: Tenant, actor: User | None = None, reason: str = "", **limits: Any) -> Tenant:
    """Change limits: `rpm`, `tpm`, `concurrency` (None: no limit), `max_priority`. Raises ValidationError."""
    if unknown := sorted(limits.keys() - set(QUOTA_FIELDS)):
        raise TypeError(f"A quota has no field {unknown[0]}")
    return update_tenant(tenant=tenant, actor=actor, reason=reason, **limits)


def suspend_tenant(*, tenant: Tenant, actor: User | None = None, reason: str = "") -> Tenant:
    """Refuse the tenant's requests from now on; what already runs goes on."""
    return _set_suspended(tenant, True, actor, reason)


def resume_tenant(*, tenant: Tenant, actor: User | None = None, reason: str = "") -> Tenant:
    """Let the tenant's requests in again."""
    return _set_suspended(tenant, False, actor, reason)


@transaction.atomic
def _set_suspended(tenant: Tenant, suspended: bool, actor: User | None, reason: str) -> Tenant:
    tenant = Tenant.objects.select_for_update().get(pk=tenant.pk)
    if tenant.suspended != suspended:
        tenant.suspended = suspended
        tenant.save(update_fields=["suspended", "updated_at"])
        action = "tenant.suspend" if suspended else "tenant.resume"
        states = ({"suspended": not suspended}, {"suspended": suspended})
        record_action(actor=actor, action=action, target=tenant.name, before=states[0], after=states[1], reason=reason)
        config_changed()
    return tenant


@transaction.atomic
def create_key(
    *,
    tenant: Tenant,
    name: str = "default",
    max_priority: int | None = None,
    actor: User | None = None,
    reason: str = "",
) -> str:
    """A new key, in plain text: the only time that it can be read. Raises ValidationError."""
    return issue_key(key=ApiKey(tenant=tenant, name=name, max_priority=max_priority), actor=actor, reason=reason)


@transaction.atomic
def issue_key(*, key: ApiKey, actor: User | None = None, reason: str = "") -> str:
    """Save a key that has tenant, name and ceiling, and give it in plain text. Raises ValidationError."""
    new = generate_key()
    key.prefix, key.digest = new.prefix, new.digest
    key.full_clean()
    key.save()
    after = {"name": key.name, "max_priority": key.max_priority}
    record_action(actor=actor, action="key.create", target=key.audit_name, after=after, reason=reason)
    config_changed()
    return new.plaintext


@transaction.atomic
def rotate_key(*, key: ApiKey, actor: User | None = None, reason: str = "") -> str:
    """Revoke a key and give its successor, in plain text, with the same name and ceiling."""
    revoke_key(key=key, actor=actor, reason=reason or "rotated")
    return create_key(
        tenant=key.tenant, name=key.name, max_priority=key.max_priority, actor=actor, reason=reason or "rotated"
    )


@transaction.atomic
def revoke_key(*, key: ApiKey, actor: User | None = None, reason: str = "") -> None:
    """Refuse requests with this key from now on."""
    now = timezone.now()
    if ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=now):
        states: Any = {"before": {"revoked_at": None}, "after": {"revoked_at": now}}
        record_action(actor=actor, action="key.revoke", target=key.audit_name, reason=reason, **states)
        config_changed()


def _quota_values(quota: Quota) -> dict[str, int | None]:
    return {name: getattr(quota, name) for name in QUOTA_FIELDS}
