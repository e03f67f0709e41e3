"""What the live page reads from the database: tenants in order of their creation, who changed what, who got what."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dashboard.selectors.alerts import count_firing
from dashboard.selectors.service import ServiceWatch
from dashboard.state import Document, prune
from scheduling.models import OperatorAction, PolicyRevision, Tenant
from scheduling.wording import say_value

NUM_ACTIONS = 12
MAX_TENANTS = 200
SWITCH_ACTIONS = ("policy.switch",)
"""Shown with more detail from their revisions."""


@dataclass(frozen=True, slots=True)
class Activity:
    """The database's part of the document."""

    tenants: list[str] = field(default_factory=list)
    actions: list[Document] = field(default_factory=list)
    service: Document = field(default_factory=dict)
    alerts: Document = field(default_factory=dict)

    def document(self) -> Document:
        """As keys of the document."""
        return {"tenants": self.tenants, "actions": self.actions, "service": self.service, "alerts": self.alerts}


def read_activity(watch: ServiceWatch) -> Activity:
    """A few short queries."""
    tenants = list(Tenant.objects.order_by("id").values_list("name", flat=True)[:MAX_TENANTS])
    switches = [_switch(row) for row in PolicyRevision.objects.order_by("-created_at", "-id")[:NUM_ACTIONS]]
    others = OperatorAction.objects.exclude(action__in=SWITCH_ACTIONS).order_by("-created_at", "-id")[:NUM_ACTIONS]
    actions = sorted([*switches, *map(_action, others)], key=lambda action: -action["when_s"])
    return Activity(tenants, prune(actions[:NUM_ACTIONS]), watch.read(), count_firing())


def _switch(row: PolicyRevision) -> Document:
    acks = acknowledged(row.acknowledgements)
    return {
        "id": f"policy-{row.pk}",
        "when_s": round(row.created_at.timestamp(), 1),
        "who": row.actor_name,
        "what": "policy.switch",
        "target": row.model,
        "text": f"{_named(row.previous_name, row.previous_params)} → {_named(row.name, row.params)}",
        "reason": row.reason,
        "revision": row.revision,
        "state": row.state,
        "num_moved": row.num_moved,
        "seconds": None if row.seconds is None else round(row.seconds, 4),
        "workers": len(acks),
        "workers_ok": sum(acks.values()),
        "error": row.error,
    }


def _action(row: OperatorAction) -> Document:
    return {
        "id": f"action-{row.pk}",
        "when_s": round(row.created_at.timestamp(), 1),
        "who": row.actor_name,
        "what": row.action,
        "target": row.target,
        "text": _answers(row.after) if "acknowledgements" in row.after else _changes(row.before, row.after),
        "reason": row.reason,
    }


def _answers(after: Mapping[str, Any]) -> str:
    """What replicas said to a command, such as `mode static, gpu-0 confirmed in 12 ms`."""
    asked = [f"{name.replace('_', ' ')} {say_value(value)}" for name, value in (after.get("arguments") or {}).items()]
    said = [
        f"{name} confirmed in {ack.get('applied_ms') or 0:.0f} ms" if ack.get("ok") else f"{name}: {ack.get('error')}"
        for name, ack in (after.get("acknowledgements") or {}).items()
        if isinstance(ack, Mapping)
    ]
    return ", ".join(asked + said)


def acknowledged(acknowledgements: Mapping[str, Any]) -> dict[str, bool]:
    """Replica -> whether it took the policy up."""
    return {name: bool(ack.get("ok")) for name, ack in acknowledgements.items() if isinstance(ack, Mapping)}


def _named(name: str, params: Mapping[str, Any]) -> str:
    inside = ", ".join(f"{key} {say_value(value)}" for key, value in params.items())
    return f"{name or 'none'} ({inside})" if inside else name or "none"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Such as `rpm 60 → 120`; only what differs."""
    parts = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if old != new:
            parts.append(f"{key} {say_value(old)} → {say_value(new)}" if key in before else f"{key} {say_value(new)}")
    return ", ".join(parts)[:300]
