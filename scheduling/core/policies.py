"""Policies: three small pure functions each (flow, weight, rank) that say where a request stands in the queue."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from scheduling.core.request import Placement, Priority, QueueEntry

MIN_SHARE = 0.001


class PolicyError(Exception):
    """The policy cannot be used."""


class UnknownPolicy(PolicyError):  # noqa: N818
    """No policy of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no policy {name!r}; there are {', '.join(sorted(POLICIES))}.")


class InvalidPolicyParameter(PolicyError):  # noqa: N818
    """A parameter is unknown or out of range; the message says which and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy with its parameters. `place` is pure: an entry gets the same placement at any time, on any host."""

    name: str
    params: Mapping[str, float]
    placing: Callable[[QueueEntry, Mapping[str, float]], Placement] = field(repr=False)

    def place(self, entry: QueueEntry) -> Placement:
        """Where `entry` stands: its flow, the flow's weight, its rank in it (the least goes first)."""
        return self.placing(entry, self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A policy's parameter: default and inclusive bounds."""

    default: float
    minimum: float
    maximum: float
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyKind:
    """What an operator chooses from: a policy before its parameters are set."""

    name: str
    description: str
    guarantee: str
    source: str
    placing: Callable[[QueueEntry, Mapping[str, float]], Placement]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, float]:
        """The parameters' defaults."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


def _place_fifo(entry: QueueEntry, params: Mapping[str, float]) -> Placement:
    return Placement(flow="all", weight=1.0, rank=entry.arrival_s)


def _place_priority(entry: QueueEntry, params: Mapping[str, float]) -> Placement:
    return Placement(flow="all", weight=1.0, rank=_aged_rank(entry, params["level_s"]))


def _place_fair(entry: QueueEntry, params: Mapping[str, float]) -> Placement:
    return Placement(flow=entry.tenant, weight=max(entry.share, MIN_SHARE), rank=_aged_rank(entry, params["level_s"]))


def _aged_rank(entry: QueueEntry, level_s: float) -> float:
    # Ordering by arrival minus a credit is linear aging without touching what waits: all age at the same speed, so the
    # difference of two requests never changes.
    return entry.arrival_s - (Priority.BULK - entry.priority) * level_s


_LEVEL = Parameter(
    default=30.0, minimum=0.0, maximum=86_400.0, description="Seconds of waiting that one priority level is worth."
)

POLICIES: Mapping[str, PolicyKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            PolicyKind(
                name="fifo",
                description="First come, first served, whoever asks.",
                guarantee="Nobody is overtaken.",
                source="Order of arrival.",
                placing=_place_fifo,
            ),
            PolicyKind(
                name="priority",
                description="Higher priority first; waiting counts towards priority, so nothing starves.",
                guarantee="Overtaken only by requests that arrive within level_s times the levels between.",
                source="Linear aging: Kleinrock, A delay dependent queue discipline (1964).",
                placing=_place_priority,
                parameters={"level_s": _LEVEL},
            ),
            PolicyKind(
                name="fair",
                description="Tenants share the fleet's tokens by weight; within a tenant, priority with aging.",
                guarantee="Backlogged tenants get tokens in proportion to their weights, up to one request each way; "
                "who was idle saves no credit.",
                source="Virtual token counter: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024), "
                "section 4; push-in-first-out: Sivaraman et al. (SIGCOMM 2016).",
                placing=_place_fair,
                parameters={"level_s": _LEVEL},
            ),
        )
    }
)


def build_policy(name: str, params: Mapping[str, Any] | None = None) -> Policy:
    """A policy from its name and the parameters that differ from the defaults.

    Raises UnknownPolicy or InvalidPolicyParameter.
    """
    kind = POLICIES.get(name)
    if kind is None:
        raise UnknownPolicy(name)
    given = dict(params or {})
    if unknown := sorted(given.keys() - kind.parameters.keys()):
        known = ", ".join(kind.parameters) or "none"
        raise InvalidPolicyParameter(f"Policy {name} has no parameter {unknown[0]!r}; it has: {known}.")
    values = {key: _checked(name, key, given.get(key, spec.default), spec) for key, spec in kind.parameters.items()}
    return Policy(name=name, params=MappingProxyType(values), placing=kind.placing)


def _checked(policy: str, key: str, value: Any, spec: Parameter) -> float:
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or not spec.minimum <= value <= spec.maximum:
        raise InvalidPolicyParameter(
            f"Policy {policy}: {key} must be a number from {spec.minimum:g} to {spec.maximum:g}, not {value!r}."
        )
    return float(value)
