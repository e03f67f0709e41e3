"""The form of a policy's parameters: what an operator typed, checked field by field."""

from collections.abc import Mapping
from typing import Any

from scheduling.core.policies import POLICIES, InvalidPolicyParameter, UnknownPolicy


def read_params(policy: str, form: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters from fields named `policy.parameter`, and a sentence for each field that cannot be used.

    Fields of other policies are left out. Raises UnknownPolicy.
    """
    kind = POLICIES.get(policy)
    if kind is None:
        raise UnknownPolicy(policy)
    params: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for field, raw in form.items():
        owner, _, name = field.partition(".")
        if owner != policy or not name:
            continue
        spec = kind.parameters.get(name)
        if spec is None:
            problems[field] = f"{policy} has no parameter {name!r}."
            continue
        try:
            params[name] = spec.check(policy, name, _number(str(raw)) if not spec.choices else str(raw))
        except InvalidPolicyParameter:
            problems[field] = _sentence(spec.choices, spec.minimum, spec.maximum, name)
    return params, problems


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _sentence(choices: tuple[str, ...], minimum: float, maximum: float, name: str) -> str:
    if choices:
        return f"{name} must be one of {', '.join(choices)}."
    return f"{name} must be a number from {minimum:,.6g} to {maximum:,.6g}."
