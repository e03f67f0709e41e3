"""The policies by name: where each places a request, what it guarantees, where it comes from (docs/policies.md)."""

from collections.abc import Mapping
from math import ceil
from types import MappingProxyType
from typing import Any

from scheduling.core.adaptive import CHOICES
from scheduling.core.policy import (
    InvalidPolicyParameter,
    Parameter,
    Params,
    Policy,
    PolicyError,
    PolicyKind,
)
from scheduling.core.request import Placement, Priority, QueueEntry
from scheduling.core.rules import QueueRules

__all__ = [
    "POLICIES",
    "InvalidPolicyParameter",
    "Parameter",
    "Policy",
    "PolicyError",
    "PolicyKind",
    "UnknownPolicy",
    "build_policy",
    "deadline_of",
]

MIN_SHARE = 0.001
LOWEST = int(Priority.BULK)
CLASSES = ("high", "medium", "low")
"""Of `wrr`: two priority levels each."""


class UnknownPolicy(PolicyError):  # noqa: N818
    """No policy of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no policy {name!r}; there are {', '.join(sorted(POLICIES))}.")


def _place_fifo(entry: QueueEntry, params: Params) -> Placement:
    return Placement("all", 1.0, entry.arrival_s)


def _place_priority(entry: QueueEntry, params: Params) -> Placement:
    return Placement("all", 1.0, _aged_rank(entry, params))


def _place_edf(entry: QueueEntry, params: Params) -> Placement:
    return Placement("all", 1.0, _deadline(entry, params))


def _place_size(entry: QueueEntry, params: Params) -> Placement:
    # How often the first edge has to be doubled to reach the length.
    edges = ceil((entry.prompt_tokens + entry.max_tokens) / params["first_edge"])
    bucket = min((edges - 1).bit_length() if edges else 0, int(params["buckets"]) - 1)
    return Placement(f"{bucket:02d}", 1.0, entry.arrival_s)


def _place_wrr(entry: QueueEntry, params: Params) -> Placement:
    name = CLASSES[entry.priority // 2]
    return Placement(name, params[name], entry.arrival_s)


def _place_fair(entry: QueueEntry, params: Params) -> Placement:
    return Placement(entry.tenant, max(entry.share, MIN_SHARE), _aged_rank(entry, params))


def _place_hierarchical(entry: QueueEntry, params: Params) -> Placement:
    rank = _RANKS[params["within"]](entry, params)
    return Placement(entry.tenant, max(entry.share, MIN_SHARE), rank)


def _place_adaptive(entry: QueueEntry, params: Params) -> Placement:
    return POLICIES[params["current"]].placing(entry, params)


def _aged_rank(entry: QueueEntry, params: Params) -> float:
    # Ordering by arrival minus a credit is linear aging without touching what waits: all age at the same speed, so the
    # difference of two requests never changes.
    credit: float = (LOWEST - entry.priority) * params["level_s"]
    return entry.arrival_s - credit


def _deadline(entry: QueueEntry, params: Params) -> float:
    if entry.deadline_s is not None:
        return entry.deadline_s
    target_s: float = params[_TARGETS[entry.priority]]
    return entry.arrival_s + target_s


def _arrival(entry: QueueEntry, params: Params) -> float:
    return entry.arrival_s


def _priority_rules(params: Params) -> QueueRules:
    return QueueRules(preempts=True)


def _edf_rules(params: Params) -> QueueRules:
    return QueueRules(late_slack_s=params["slack_s"], promote_after_s=params["promote_after_s"] or None)


def _size_rules(params: Params) -> QueueRules:
    return QueueRules(run=int(params["run"]))


def _wrr_rules(params: Params) -> QueueRules:
    prices = {"requests": (1.0, 0.0, 0.0), "tokens": (0.0, 1.0, 1.0)}[params["share_of"]]
    return QueueRules(
        promote_after_s=params["promote_after_s"],
        request_price=prices[0],
        prompt_price=prices[1],
        output_price=prices[2],
    )


def _fair_rules(params: Params) -> QueueRules:
    return QueueRules(prompt_price=params["prompt_price"], output_price=params["output_price"])


def _hierarchical_rules(params: Params) -> QueueRules:
    return QueueRules(
        late_slack_s=params["slack_s"] if params["within"] == "edf" else None,
        prompt_price=params["prompt_price"],
        output_price=params["output_price"],
    )


def _adaptive_rules(params: Params) -> QueueRules:
    return POLICIES[params["current"]].ruling(params)


def _seconds(default: float, description: str, minimum: float = 0.0) -> Parameter:
    return Parameter(default=default, minimum=minimum, maximum=86_400.0, description=description)


def _within(default: str) -> Parameter:
    return Parameter(default=default, choices=tuple(_RANKS), description="The order within a tenant.")


def _price(default: float, of: str) -> Parameter:
    return Parameter(default=default, minimum=0.01, maximum=100.0, description=f"What a tenant is charged per {of}.")


_RANKS = {"fifo": _arrival, "priority": _aged_rank, "edf": _deadline}
_TARGETS = tuple(f"{level.name.lower()}_s" for level in Priority)

_LEVEL = _seconds(30.0, "Seconds of waiting that one priority level is worth.")
_DEADLINES = {
    **{
        name: _seconds(target_s, f"Seconds from arrival to the deadline of a {level.name.lower()} request without one.")
        for name, level, target_s in zip(_TARGETS, Priority, (2.0, 5.0, 10.0, 30.0, 120.0, 600.0), strict=True)
    },
    "slack_s": _seconds(0.0, "A request whose deadline is nearer than this is hopeless: it goes after the rest."),
}
_PROMOTE = _seconds(0.0, "Whoever waited this long is next; 0: hopeless requests may starve.")
_LENGTHS = {
    "first_edge": Parameter(
        default=256.0,
        minimum=1.0,
        maximum=1_000_000.0,
        description="Tokens of the first bucket's longest request; each further bucket reaches twice as far.",
    ),
    "buckets": Parameter(
        default=12.0, minimum=1.0, maximum=24.0, description="Number of buckets; the last has no end."
    ),
    "run": Parameter(
        default=8.0,
        minimum=1.0,
        maximum=256.0,
        description="Requests that one claim takes from a bucket before another bucket's turn.",
    ),
}
_PRICES = {"prompt_price": _price(1.0, "prompt token"), "output_price": _price(2.0, "output token")}
_VTC = "Virtual token counter: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024), section 4"

_KINDS = (
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
        ruling=_priority_rules,
    ),
    PolicyKind(
        name="edf",
        description="Earliest deadline first: the request's own, or its arrival and the target of its priority. "
        "Hopeless ones go after the rest.",
        guarantee="Nobody whose deadline can be met waits for a later deadline or for a hopeless request; "
        "with promote_after_s, whoever waited so long is next.",
        source="Liu and Layland, Scheduling algorithms for multiprogramming in a hard-real-time environment (1973).",
        placing=_place_edf,
        parameters={**_DEADLINES, "promote_after_s": _PROMOTE},
        ruling=_edf_rules,
    ),
    PolicyKind(
        name="size",
        description="Similar lengths together: buckets by prompt plus max_tokens, taken in runs, tokens shared evenly.",
        guarantee="A run's requests differ in length by less than two times; while a bucket waits, no other gets more "
        "tokens than it, but for one run each.",
        source="Bucketing by sequence length; between buckets start-time fair queueing: Goyal et al. (SIGCOMM 1996).",
        placing=_place_size,
        parameters=_LENGTHS,
        ruling=_size_rules,
    ),
    PolicyKind(
        name="wrr",
        description="Three classes share by weight: high (critical, realtime), medium (high, normal), low (low, bulk).",
        guarantee="Waiting classes are served in proportion to their weights, up to one request each way; "
        "whoever waited promote_after_s is next, the oldest first.",
        source="Weighted round robin: Katevenis et al. (1991), made exact by start-time fair queueing: "
        "Goyal et al. (SIGCOMM 1996).",
        placing=_place_wrr,
        parameters={
            **{
                name: Parameter(
                    default=weight, minimum=0.01, maximum=1_000.0, description=f"Weight of the {name} class."
                )
                for name, weight in zip(CLASSES, (70.0, 20.0, 10.0), strict=True)
            },
            "promote_after_s": _seconds(30.0, "Whoever waited this long is next, whatever its class."),
            "share_of": Parameter(
                default="tokens", choices=("tokens", "requests"), description="What the classes share by weight."
            ),
        },
        ruling=_wrr_rules,
    ),
    PolicyKind(
        name="fair",
        description="Tenants share the fleet's tokens by weight; within a tenant, priority with aging.",
        guarantee="Backlogged tenants get tokens at their prices in proportion to their weights, up to one request "
        "each way; who was idle saves no credit.",
        source=f"{_VTC}; push-in-first-out: Sivaraman et al. (SIGCOMM 2016).",
        placing=_place_fair,
        parameters={"level_s": _LEVEL, **_PRICES},
        ruling=_fair_rules,
    ),
    PolicyKind(
        name="hierarchical",
        description="Tenants share the fleet's tokens by weight; within a tenant, the order you choose.",
        guarantee="Between tenants that of fair; within one that of the order chosen.",
        source=f"{_VTC}; two levels: Bennett and Zhang, Hierarchical packet fair queueing (SIGCOMM 1996).",
        placing=_place_hierarchical,
        parameters={
            "within": _within("priority"),
            "level_s": _LEVEL,
            **_DEADLINES,
            **_PRICES,
        },
        ruling=_hierarchical_rules,
    ),
    PolicyKind(
        name="adaptive",
        description="Chooses among the others by load, missed deadlines, imbalance of tenants, priorities and lengths.",
        guarantee="That of the policy in `current`, with the parameters given here; no two switches of its own within "
        "dwell_s, none for signs that have not lasted hold_s, each with its reason.",
        source="Thresholds with hysteresis, minimum dwell and a holding time.",
        placing=_place_adaptive,
        parameters={
            "current": Parameter(default="fifo", choices=CHOICES, description="The policy it has chosen."),
            "dwell_s": _seconds(60.0, "Least time between two switches of its own.", minimum=1.0),
            "hold_s": _seconds(10.0, "How long another policy has to fit better before it is switched to."),
            "calm_depth": Parameter(
                default=8.0, minimum=1.0, maximum=1e6, description="While fewer requests wait, nothing is judged."
            ),
            "imbalance": Parameter(
                default=2.0,
                minimum=1.0,
                maximum=1e6,
                description="Most waiting tokens of a tenant over the mean of the others.",
            ),
            "misses": Parameter(
                default=0.1, minimum=0.001, maximum=1.0, description="Part of what waits that is past its deadline."
            ),
            "mixture": Parameter(
                default=0.2, minimum=0.001, maximum=1.0, description="Part of what waits not of the commonest priority."
            ),
            "spread": Parameter(
                default=4.0, minimum=1.0, maximum=1e6, description="90th percentile over median of the lengths waiting."
            ),
            # Those of the policies that it chooses among: each goes by those of its own names.
            "level_s": _LEVEL,
            **_DEADLINES,
            "promote_after_s": _PROMOTE,
            **_LENGTHS,
            **_PRICES,
            "within": _within("edf"),
        },
        ruling=_adaptive_rules,
    ),
)

POLICIES: Mapping[str, PolicyKind] = MappingProxyType({kind.name: kind for kind in _KINDS})
_EDF_DEFAULTS = POLICIES["edf"].params


def build_policy(name: str, params: Mapping[str, Any] | None = None) -> Policy:
    """A policy from its name and the parameters that differ from the defaults.

    Raises UnknownPolicy or InvalidPolicyParameter.
    """
    kind = POLICIES.get(name)
    if kind is None:
        raise UnknownPolicy(name)
    return kind.build(params or {})


def deadline_of(entry: QueueEntry, params: Params | None = None) -> float:
    """A request's deadline (unix seconds) as `edf` sees it, with these parameters or by default."""
    return _deadline(entry, _EDF_DEFAULTS if params is None else params)
