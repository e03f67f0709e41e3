"""Import of tenants: first what would change and what is wrong, then, unless anything is, all of it at once."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.db import transaction

from scheduling.audit import record_action
from scheduling.models import Quota, ServiceLevel, Tenant
from scheduling.services import (
    QUOTA_FIELDS,
    config_changed,
    create_tenant,
    resume_tenant,
    suspend_tenant,
    update_tenant,
)
from scheduling.tenant_files import LEVEL_FIELDS, PRIORITIES, Entry, Problem, Values, read_current, read_file

__all__ = ["Change", "Plan", "StalePlanError", "apply_plan", "plan_import"]

DEFAULTS: Values = {
    "display_name": "", "weight": 1.0, "suspended": False, "drop_expired": False, "rpm": None, "tpm": None, "tpd": None,
    "concurrency": None, "max_priority": "high", "service_levels": [],
}  # fmt: skip
"""What a new tenant gets where the file says nothing; one that exists keeps what it has."""


class StalePlanError(Exception):
    """The tenants have changed since the plan was shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the file makes of one tenant: (field, old, new); none of one that stays as it is."""

    name: str
    is_new: bool
    fields: list[tuple[str, Any, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that an import would do; nothing at all where there are problems."""

    changes: list[Change]
    num_same: int
    problems: list[Problem]

    @property
    def digest(self) -> str:
        """Stands for exactly these changes."""
        told = [(change.name, change.is_new, change.fields) for change in self.changes]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def plan_import(content: bytes) -> Plan:
    """What a file would change. Raises FileError; changes nothing."""
    entries, current = read_file(content), read_current()
    for entry in entries:
        if not entry.problems:
            _validate(entry, current)
    problems = [problem for entry in entries for problem in entry.problems]
    changes = [_change(entry, current.get(entry.values["name"])) for entry in entries if not entry.problems]
    changed = [change for change in changes if change.fields or change.is_new]
    return Plan(changes=changed, num_same=len(changes) - len(changed), problems=problems)


@transaction.atomic
def apply_plan(content: bytes, digest: str, *, actor: User, reason: str) -> Plan:
    """Do what the plan of this digest said, and write it into the audit trail.

    Raises StalePlanError where the file would do anything else by now, ValidationError and FileError.
    """
    list(Tenant.objects.select_for_update())
    plan = plan_import(content)
    if plan.problems or plan.digest != digest:
        raise StalePlanError
    for change in plan.changes:
        _apply(change, actor, reason)
    config_changed()
    return plan


def _change(entry: Entry, current: Values | None) -> Change:
    before = current or DEFAULTS
    named = [(name, before[name], value) for name, value in entry.values.items() if name != "name"]
    fields = [(name, old, new) for name, old, new in named if old != new]
    return Change(name=entry.values["name"], is_new=current is None, fields=fields)


def _validate(entry: Entry, current: dict[str, Values]) -> None:
    """What the admin's forms would say of the tenant that this makes."""
    values = {**DEFAULTS, **current.get(entry.values["name"], {}), **entry.values}
    tenant = Tenant(**{name: values[name] for name in ("name", "display_name", "weight", "suspended", "drop_expired")})
    quota = Quota(tenant=tenant, **_quota(values))
    rows: list[tuple[str, Any, Sequence[str]]] = [("", tenant, ()), ("", quota, ("tenant",))]
    rows += [
        ("service_levels", ServiceLevel(tenant=None, **_numbered(level)), ("tenant",))
        for level in values["service_levels"]
    ]
    for field, row, exclude in rows:
        try:
            row.full_clean(exclude=exclude, validate_unique=False, validate_constraints=False)
        except ValidationError as error:
            for name, messages in error.message_dict.items():
                entry.refuse(field or ("" if name == "__all__" else name), " ".join(messages))


def _apply(change: Change, actor: User, reason: str) -> None:
    values = {name: new for name, _, new in change.fields}
    levels, suspended = values.pop("service_levels", None), values.pop("suspended", None)
    if "max_priority" in values:
        values["max_priority"] = PRIORITIES[values["max_priority"]]
    if change.is_new:
        tenant = create_tenant(name=change.name, actor=actor, reason=reason, **values)
    else:
        tenant = Tenant.objects.get(name=change.name)
        if values:
            update_tenant(tenant=tenant, actor=actor, reason=reason, **values)
    if suspended is not None:
        (suspend_tenant if suspended else resume_tenant)(tenant=tenant, actor=actor, reason=reason)
    if levels is not None:
        _set_levels(tenant, levels, actor, reason)


def _set_levels(tenant: Tenant, levels: list[Values], actor: User, reason: str) -> None:
    before = [{name: getattr(row, name) for name in LEVEL_FIELDS} for row in tenant.service_levels.order_by("priority")]
    tenant.service_levels.all().delete()
    ServiceLevel.objects.bulk_create(ServiceLevel(tenant=tenant, **_numbered(level)) for level in levels)
    after = [_numbered(level) for level in levels]
    record_action(
        actor=actor, action="servicelevel.update", target=tenant.name, before={"levels": before},
        after={"levels": after}, reason=reason,
    )  # fmt: skip


def _quota(values: Values) -> Values:
    return {name: values[name] for name in QUOTA_FIELDS} | {"max_priority": PRIORITIES[values["max_priority"]]}


def _numbered(level: Values) -> Values:
    return {**level, "priority": PRIORITIES[level["priority"]]}
