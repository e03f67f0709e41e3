"""How large a batch may be: the sizing strategies and their registry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType
from typing import Any

from scheduling.core.policy import Parameter
from scheduling.core.sizing.controller import Controller, Observation
from scheduling.core.sizing.gradient import Gradient
from scheduling.core.sizing.thompson import Adaptive, decode_rate

SHRINK_ABOVE = 1.2
"""Latency above this share of its target: too slow."""
GROW_BELOW = 0.7
"""Latency below this share of its target: room for more."""
IDLE_PERCENT = 50.0
"""Below this utilization a device waits for its host most of the time: a larger batch costs it next to nothing."""
KV_FULL = 0.95
"""From this share of KV blocks on, a larger batch would only be preempted."""


class SizingError(Exception):
    """The sizing strategy cannot be used."""


class UnknownSizing(SizingError):  # noqa: N818
    """No sizing strategy of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no sizing strategy {name!r}; there are {', '.join(sorted(SIZINGS))}.")


class InvalidSizingParameter(SizingError):  # noqa: N818
    """A parameter is unknown or out of range; the message says which and what is allowed."""


def _step_up(size: int, share: float) -> int:
    return size + max(1, int(size * share))


def _step_down(size: int, share: float) -> int:
    return size - max(1, int(size * share))


class Fixed(Controller):
    """Always the size that was set."""

    name = "fixed"

    def propose(self, observation: Observation) -> tuple[int, str]:
        return int(self.params["initial"]), "set by the operator"


class ThroughputFirst(Controller):
    """As large as still pays: grows while work waits and the next sequences bring enough tokens a second more."""

    name = "throughput_first"

    def propose(self, observation: Observation) -> tuple[int, str]:
        size = self._size
        if observation.kv_usage >= KV_FULL and observation.preemptions:
            return _step_down(size, 0.125), "sequences are preempted for lack of KV blocks"
        if not self.is_full(observation):
            return size, "nothing waits for a slot"
        larger = _step_up(size, 0.5 if _is_idle(observation) else 0.25)
        gain = _throughput_gain(observation, size, larger)
        # A sequence more in ten brings at best a tenth more tokens; below the least gain it only costs latency.
        if gain is not None and gain < self.params["least_gain"] * (larger / size - 1):
            return size, f"{larger} would bring only {gain:.1%} more tokens a second"
        return larger, "work waits and a larger batch brings more tokens a second"


def _is_idle(observation: Observation) -> bool:
    """Whether the device itself has time left although work waits."""
    device = observation.telemetry
    return device is not None and device.utilization_percent is not None and device.utilization_percent < IDLE_PERCENT


def _throughput_gain(observation: Observation, size: int, larger: int) -> float | None:
    """How many more tokens a second a larger batch decodes, as a share; None where the cost is unknown."""
    cost, context = observation.cost, observation.mean_context_tokens
    return None if cost is None else decode_rate(cost, larger, context) / decode_rate(cost, size, context) - 1


class LatencyFirst(Controller):
    """AIMD on the p99 against its target.

    As TCP finds a rate (Chiu and Jain, 1989); for batch sizes Clipper (Crankshaw et al., NSDI 2017, section 4.3).
    """

    name = "latency_first"

    def propose(self, observation: Observation) -> tuple[int, str]:
        size, ratio = self._size, observation.latency_ratio
        if ratio is None:
            return size, "no latency and target to compare"
        if ratio > SHRINK_ABOVE:
            return min(size - 1, int(size * self.params["decrease"])), f"p99 is {ratio:.0%} of its target"
        if ratio < GROW_BELOW and self.is_full(observation):
            return size + int(self.params["increase"]), f"p99 is {ratio:.0%} of its target and work waits"
        return size, f"p99 is {ratio:.0%} of its target"


class Balanced(Controller):
    """The most throughput within the target: moves in proportion to the distance from it."""

    name = "balanced"

    def propose(self, observation: Observation) -> tuple[int, str]:
        size, ratio = self._size, observation.latency_ratio
        if ratio is None:
            if self.is_full(observation) and observation.kv_usage < KV_FULL:
                return _step_up(size, 0.125), "work waits and no target is missed"
            return size, "no latency and target to compare"
        change = min(0.25, max(-0.25, self.params["gain"] * (1 - ratio)))
        if abs(1 - ratio) < self.params["dead_band"]:
            return size, f"p99 is {ratio:.0%} of its target: near enough"
        if change < 0:
            return _step_down(size, -change), f"p99 is {ratio:.0%} of its target"
        if self.is_full(observation) and observation.kv_usage < KV_FULL:
            return _step_up(size, change), f"p99 is {ratio:.0%} of its target and work waits"
        return size, f"p99 is {ratio:.0%} of its target; nothing waits for a slot"


class MemoryEfficient(Controller):
    """The smallest batch that the load needs, with KV use held below a line."""

    name = "memory_efficient"

    def propose(self, observation: Observation) -> tuple[int, str]:
        size, usage, line = self._size, observation.kv_usage, self.params["kv_line"]
        if usage > line or observation.preemptions:
            return _step_down(min(size, max(1, observation.num_running)), 0.125), f"KV use is {usage:.0%}"
        if self.is_full(observation):
            grown = _step_up(size, 0.125)
            expected = usage * grown / max(1, observation.num_running)
            if expected <= line:
                return grown, f"work waits and KV use is {usage:.0%}"
            return size, f"{grown} sequences would take {expected:.0%} of KV memory"
        if not observation.num_waiting and observation.num_running < size // 2:
            return _step_down(size, 0.125), f"only {observation.num_running} run"
        return size, f"KV use is {usage:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizingKind:
    """What an operator chooses from."""

    name: str
    description: str
    build: Callable[[Mapping[str, float], Random], Controller] = field(repr=False)
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, float]:
        """The parameters' defaults."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


def _number(default: float, minimum: float, maximum: float, description: str) -> Parameter:
    return Parameter(default=default, minimum=minimum, maximum=maximum, description=description)


_BOUNDS = {
    "initial": _number(16, 1, 4096, "Batch size to begin with."),
    "smallest": _number(1, 1, 4096, "Never fewer, unless memory forbids."),
    "largest": _number(256, 1, 4096, "Never more."),
    "hot_c": _number(90, 0, 200, "From this temperature on (degrees Celsius) no batch grows."),
    "power_w": _number(0, 0, 5000, "From this power on (watts) no batch grows; 0 sets no limit."),
    "reserve_mb": _number(64, 0, 1_000_000, "While less device memory is free (MB) no batch grows."),
}

SIZINGS: Mapping[str, SizingKind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            SizingKind(
                name="fixed",
                description="The size that is set.",
                build=Fixed,
                parameters={"initial": _number(16, 1, 4096, "The batch size.")},
            ),
            SizingKind(
                name="throughput_first",
                description="As many as wait, while more still bring more tokens a second.",
                build=ThroughputFirst,
                parameters={
                    **_BOUNDS,
                    "least_gain": _number(
                        0.1, 0, 1, "Gain in tokens a second that pays, per share of sequences added."
                    ),
                },
            ),
            SizingKind(
                name="latency_first",
                description="Shrinks fast when the p99 is above 120 % of its target, grows slowly below 70 %.",
                build=LatencyFirst,
                parameters={
                    **_BOUNDS,
                    "increase": _number(1, 1, 64, "Sequences added at a time."),
                    "decrease": _number(0.75, 0.1, 0.99, "What is left of the size when it shrinks."),
                },
            ),
            SizingKind(
                name="balanced",
                description="As much throughput as the target allows.",
                build=Balanced,
                parameters={
                    **_BOUNDS,
                    "gain": _number(0.5, 0.05, 2, "Change of the size per distance from the target."),
                    "dead_band": _number(0.1, 0, 0.5, "Distance from the target that is left alone."),
                },
            ),
            SizingKind(
                name="memory_efficient",
                description="No more sequences than the load needs; KV use below a line.",
                build=MemoryEfficient,
                parameters={**_BOUNDS, "kv_line": _number(0.85, 0.1, 1, "KV use to stay below.")},
            ),
            SizingKind(
                name="gradient",
                description="As many as are taken before latency rises above its best; needs no target.",
                build=Gradient,
                parameters={
                    **_BOUNDS,
                    "tolerance": _number(
                        2, 1.1, 20, "How many times its best a latency may be before the size shrinks."
                    ),
                    "decrease": _number(0.75, 0.1, 0.99, "What is left of the size when requests are turned away."),
                    "probe_s": _number(
                        30, 1, 3600, "Seconds after which half the size is tried where its best is in doubt."
                    ),
                    "drift": _number(0.002, 0, 0.1, "Share by which the best latency is forgotten, a second."),
                },
            ),
            SizingKind(
                name="adaptive",
                description="Learns by trying which size gives most tokens within the SLA, and keeps learning.",
                build=Adaptive,
                parameters={
                    **_BOUNDS,
                    "discount": _number(
                        0.98, 0.5, 0.9999, "How much of what was learned a decision later still counts."
                    ),
                    "dwell": _number(6, 1, 1000, "Periods that a size is kept, so that its effect shows."),
                    "prior": _number(1, 0.01, 10, "How many decisions the hope for an untried size is worth."),
                },
            ),
        )
    }
)


def build_sizing(name: str, params: Mapping[str, Any] | None = None, *, random: Random | None = None) -> Controller:
    """A controller from a strategy's name and the parameters that differ from the defaults.

    `random` makes what is drawn repeatable. Raises UnknownSizing or InvalidSizingParameter.
    """
    kind = SIZINGS.get(name)
    if kind is None:
        raise UnknownSizing(name)
    given = dict(params or {})
    if unknown := sorted(given.keys() - kind.parameters.keys()):
        known = ", ".join(kind.parameters)
        raise InvalidSizingParameter(f"Sizing {name} has no parameter {unknown[0]!r}; it has: {known}.")
    values = {key: _checked(name, key, given.get(key, spec.default), spec) for key, spec in kind.parameters.items()}
    if "largest" in values:
        largest = values["largest"]
        if values["smallest"] > largest:
            raise InvalidSizingParameter(f"Sizing {name}: smallest is above largest.")
        if "initial" not in given:
            values["initial"] = min(max(values["initial"], values["smallest"]), largest)
        if not values["smallest"] <= values["initial"] <= largest:
            raise InvalidSizingParameter(f"Sizing {name}: initial lies between smallest and largest.")
    return kind.build(MappingProxyType(values), random or Random())  # noqa: S311


def _checked(sizing: str, key: str, value: Any, spec: Parameter) -> float:
    if problem := spec.problem(value):
        raise InvalidSizingParameter(f"Sizing {sizing}: {key} {problem}")
    return float(value)
