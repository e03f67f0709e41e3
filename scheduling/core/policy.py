"""What a policy is: pure placement by parameters that an operator may edit, and rules for the queue."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from scheduling.core.request import Placement, QueueEntry
from scheduling.core.rules import PLAIN, QueueRules

Params = Mapping[str, Any]
"""Parameter -> float, or str where the parameter is a choice."""


class PolicyError(Exception):
    """The policy cannot be used."""


class InvalidPolicyParameter(PolicyError):  # noqa: N818
    """A parameter is unknown or out of range; the message says which and what is allowed."""

    def __init__(self, message: str, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy with its parameters. `place` is pure: an entry gets the same placement at any time, on any host."""

    name: str
    params: Params
    placing: Callable[[QueueEntry, Params], Placement] = field(repr=False)
    rules: QueueRules = PLAIN

    def place(self, entry: QueueEntry) -> Placement:
        """Where `entry` stands: its flow, the flow's weight, its rank in it (the least goes first)."""
        return self.placing(entry, self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A policy's parameter: a number within inclusive bounds, or one of `choices` where there are any."""

    default: Any
    description: str
    minimum: float = 0.0
    maximum: float = 0.0
    choices: tuple[str, ...] = ()

    def check(self, policy: str, name: str, value: Any) -> float | str:
        """The value as it is kept. Raises InvalidPolicyParameter."""
        if problem := self.problem(value):
            raise InvalidPolicyParameter(f"Policy {policy}: {name} {problem}", name)
        return str(value) if self.choices else float(value)

    def problem(self, value: Any) -> str:
        """What is wrong with a value, as the end of a sentence; "" where nothing is."""
        if self.choices:
            return "" if value in self.choices else f"must be one of {', '.join(self.choices)}, not {value!r}."
        number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if number and self.minimum <= value <= self.maximum:
            return ""
        return f"must be a number from {self.minimum:g} to {self.maximum:g}, not {value!r}."


def _no_rules(params: Params) -> QueueRules:
    return PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyKind:
    """What an operator chooses from: a policy before its parameters are set."""

    name: str
    description: str
    guarantee: str
    source: str
    placing: Callable[[QueueEntry, Params], Placement]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    ruling: Callable[[Params], QueueRules] = _no_rules

    @property
    def params(self) -> dict[str, Any]:
        """The parameters' defaults."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def build(self, given: Params) -> Policy:
        """The policy with these parameters and the defaults of the others. Raises InvalidPolicyParameter."""
        if unknown := sorted(given.keys() - self.parameters.keys()):
            known = ", ".join(self.parameters) or "none"
            raise InvalidPolicyParameter(
                f"Policy {self.name} has no parameter {unknown[0]!r}; it has: {known}.", unknown[0]
            )
        values = {
            name: spec.check(self.name, name, given.get(name, spec.default)) for name, spec in self.parameters.items()
        }
        return Policy(name=self.name, params=MappingProxyType(values), placing=self.placing, rules=self.ruling(values))
