"""The audit trail: who changed what, from what to what, and why."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from django.contrib.auth.models import User

from scheduling.models import OperatorAction

SYSTEM = "system"
"""Named where no person signed in: management commands and periodic tasks."""

origin: ContextVar[str] = ContextVar("origin", default="")
"""Address of the browser whose request is being served; empty in commands and tasks.

Every change writes the trail, from the admin's forms to the switch of a policy; none of them could hand it down.
"""

by_token: ContextVar[str] = ContextVar("by_token", default="")
"""The beginning of the operator's token that the request came with; empty for a session."""


def name_actor(actor: User | None) -> str:
    """The name that stays when the account is gone."""
    return actor.get_username() if actor else SYSTEM


def record_action(
    *,
    actor: User | None,
    action: str,
    target: str,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    reason: str = "",
    actor_name: str = "",
) -> OperatorAction:
    """Add a row; `actor_name` is kept where no user acts.

    Call it in the transaction of the change itself, so that there is never one without the other. Before a change that
    no transaction takes back, such as one in Redis, call it first, and have it committed: the row says what was asked.
    """
    return OperatorAction.objects.create(
        actor=actor,
        actor_name=actor_name or name_actor(actor),
        action=action,
        target=target,
        before=dict(before or {}),
        after=dict(after or {}),
        reason=reason,
        address=origin.get(),
        token=by_token.get(),
    )
