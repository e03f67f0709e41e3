"""The adaptive policy's judgement: which of the other policies fits what waits, with hysteresis, and why."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scheduling.core.request import QueueEntry

RELEASE = 0.7
"""A sign that has shown itself holds until it is below this part of its threshold."""

CHOICES = ("fifo", "priority", "edf", "size", "fair", "hierarchical")
"""What it chooses among. `wrr` is not: its weights are an operator's wish, which nothing that waits can tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What is seen of a queue at one moment."""

    depth: int
    imbalance: float | None = 1.0
    """Tokens waiting for the tenant with the most (by its weight), over the mean of the others; 1 is even.

    None where one tenant alone waits. That says nothing: under `fair` the others may be served as they come.
    """
    misses: float = 0.0
    """The part of what waits whose deadline has passed."""
    mixture: float = 0.0
    """The part of what waits that is not of the commonest priority."""
    spread: float = 1.0
    """Length (prompt plus `max_tokens`) at the 90th percentile over that at the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveState:
    """What is remembered from one look to the next."""

    switched_s: float
    """When the policy was last switched, by anybody."""
    shown: frozenset[str] = field(default=frozenset())
    """Signs that are above their threshold, or were and have not fallen enough since."""
    wanted: str = ""
    wanted_since_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A policy to switch to, and a sentence that says why."""

    policy: str
    reason: str


def observe(
    sample: Sequence[QueueEntry], depth: int, now: float, deadline: Callable[[QueueEntry], float]
) -> Conditions:
    """Conditions from a sample of what waits; `deadline` gives a request's, in unix seconds."""
    if not sample:
        return Conditions(depth=depth)
    by_tenant: dict[str, float] = defaultdict(float)
    for entry in sample:
        by_tenant[entry.tenant] += entry.cost_tokens / max(entry.share, 0.001)
    most, others = max(by_tenant.values()), len(by_tenant) - 1
    lengths = sorted(entry.cost_tokens for entry in sample)
    commonest = Counter(entry.priority for entry in sample).most_common(1)[0][1]
    return Conditions(
        depth=depth,
        # Over the mean of all, two tenants would never be more than 2 apart.
        imbalance=most * others / (sum(by_tenant.values()) - most) if others else None,
        misses=sum(deadline(entry) < now for entry in sample) / len(sample),
        mixture=1 - commonest / len(sample),
        spread=lengths[(9 * len(lengths)) // 10] / lengths[len(lengths) // 2],
    )


def choose(
    state: AdaptiveState, conditions: Conditions, *, current: str, params: Mapping[str, Any], now: float
) -> tuple[AdaptiveState, Choice | None]:
    """The state after a look, and the policy to switch to now, if any.

    `params` are those of the policy `adaptive`. While fewer than `calm_depth` wait, order matters little and nothing is
    judged. A switch takes that another policy is wanted throughout `hold_s`, and that the last switch is `dwell_s` ago:
    so there are never two within `dwell_s`, and signs that wobble between threshold and release change nothing.
    """
    if conditions.depth < params["calm_depth"]:
        return replace(state, wanted="", wanted_since_s=now), None
    shown = frozenset(name for name in _SIGNS if _is_shown(name, conditions, params, name in state.shown))
    wanted = _fitting(shown)
    since_s = state.wanted_since_s if wanted == state.wanted else now
    state = replace(state, shown=shown, wanted=wanted, wanted_since_s=since_s)
    settled = now - since_s >= params["hold_s"] and now - state.switched_s >= params["dwell_s"]
    if wanted == current or not settled:
        return state, None
    reason = f"{_explain(shown, conditions)}; {conditions.depth} wait, and it has been so for {now - since_s:.0f} s"
    return replace(state, switched_s=now), Choice(policy=wanted, reason=reason)


def _is_shown(name: str, conditions: Conditions, params: Mapping[str, Any], was: bool) -> bool:
    threshold: float = params[name]
    value: float | None = getattr(conditions, name)
    return was if value is None else value >= threshold * (RELEASE if was else 1.0)


def _fitting(shown: frozenset[str]) -> str:
    if {"imbalance", "misses"} <= shown:
        return "hierarchical"
    for name, policy in (("imbalance", "fair"), ("misses", "edf"), ("mixture", "priority"), ("spread", "size")):
        if name in shown:
            return policy
    return "fifo"


def _explain(shown: frozenset[str], conditions: Conditions) -> str:
    values = {name: getattr(conditions, name) for name in _SIGNS if name in shown}
    texts = [_LONE if value is None else _SIGNS[name].format(value) for name, value in values.items()]
    return ", ".join(texts) or "tenants, deadlines, priorities and lengths are even"


_SIGNS = {
    "imbalance": "one tenant has {:.1f} times the mean of the others' waiting tokens",
    "misses": "{:.0%} of what waits is past its deadline",
    "mixture": "{:.0%} of what waits is of other priorities than the commonest",
    "spread": "long requests are {:.1f} times the median",
}
_LONE = "one tenant alone waits, after it had more waiting than the others"
