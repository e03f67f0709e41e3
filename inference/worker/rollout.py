"""What an engine process that serves does about a deployment that was changed: takes it up, or ends for a successor."""

from typing import Literal

import msgspec

from inference.messages import DeploymentSpec

LIVE_FIELDS = frozenset(
    {"mode", "max_batch_size", "sizing", "sizing_params", "triggers", "long_prefill_threshold", "targets"}
)
"""Fields that a running engine takes up between two steps. Any other is part of how the model was loaded."""
IGNORED_FIELDS = frozenset({"created_s"})
OVERRIDES = {"mode": {"mode"}, "batch size": {"max_batch_size", "sizing", "sizing_params"}}
"""By kind of command: fields whose change takes back what an operator told this replica."""


def changed_fields(before: DeploymentSpec, after: DeploymentSpec) -> set[str]:
    """Names of the fields that matter and differ."""
    fields = (field.name for field in msgspec.structs.fields(DeploymentSpec))
    return {name for name in fields if getattr(before, name) != getattr(after, name)} - IGNORED_FIELDS


def judge_change(before: DeploymentSpec, after: DeploymentSpec) -> Literal["none", "live", "restart"]:
    """Whether an engine that serves `before` has to do anything to serve `after`."""
    changed = changed_fields(before, after)
    if not changed:
        return "none"
    return "live" if changed <= LIVE_FIELDS else "restart"


def overridden(before: DeploymentSpec, after: DeploymentSpec) -> list[str]:
    """Kinds of commands that the change takes back."""
    changed = changed_fields(before, after)
    return [kind for kind, fields in OVERRIDES.items() if fields & changed]
