"""What a batch size controller sees, what it answers, and the bounds that none of them may leave."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from scheduling.core.sizing.cost_model import StepCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """What the device says. Fields its source cannot read are None."""

    utilization_percent: float | None = None
    memory_free_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One period of one engine, a fraction of a second or longer. Counts are of this period alone."""

    now_s: float
    seconds: float
    """Length of the period."""
    steps: int
    step_s: float = 0.0
    """Mean seconds of a step."""
    tokens: int = 0
    """Output tokens made."""
    good_tokens: int = 0
    """Tokens of requests that ended within their SLA."""
    num_running: int = 0
    """Sequences in the batch at the period's end."""
    num_waiting: int = 0
    p99_s: float | None = None
    """Latency at the 99th percentile over the last while; None where nothing ended."""
    target_s: float | None = None
    """What that latency should be; None where no SLA says."""
    preemptions: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 1
    memory_batch_limit: int | None = None
    """The most sequences that the memory model allows; None where there is no model."""
    cost: StepCost | None = None
    """What steps cost, as learned so far."""
    mean_context_tokens: float = 0.0
    """Of the running sequences."""
    telemetry: Readings | None = None
    first_token_s: float | None = None
    """Median seconds from the claim to the first token, of the latest requests; None where that is not known."""
    refusals: int = 0
    """Requests that a server behind this one turned away, or left without an answer."""

    @property
    def kv_usage(self) -> float:
        return self.kv_blocks_used / self.kv_blocks_total

    @property
    def latency_ratio(self) -> float | None:
        """Latency as a share of its target; None where either is unknown."""
        if self.p99_s is None or not self.target_s:
            return None
        return self.p99_s / self.target_s


class Decision(NamedTuple):
    """A batch size from now on, and why."""

    batch_size: int
    reason: str


class Sizing(Protocol):
    """What an engine needs of a controller: tell it each period, ask it when convenient."""

    @property
    def name(self) -> str:
        """The strategy's name."""
        ...

    def observe(self, observation: Observation) -> None:
        """Take note of a period."""
        ...

    def decide(self) -> Decision:
        """The batch size to use from now on."""
        ...


def memory_limit(observation: Observation) -> int:
    """The most sequences that memory allows, at least 1: by the memory model, and by what the running ones hold."""
    limits = [observation.kv_blocks_total]
    if observation.memory_batch_limit is not None:
        limits.append(observation.memory_batch_limit)
    if observation.num_running and observation.kv_blocks_used:
        blocks_each = math.ceil(observation.kv_blocks_used / observation.num_running)
        limits.append(observation.kv_blocks_total // blocks_each)
    return max(1, min(limits))


class Controller(ABC):
    """Base of the strategies: they propose; here bounds, memory and a hot device have the last word."""

    name: str

    def __init__(self, params: Mapping[str, float], random: Random) -> None:
        self.params = params
        self.random = random
        self._smallest = int(params.get("smallest", 1))
        self._largest = int(params.get("largest", 4096))
        self._size = int(params["initial"])
        self._reason = "the initial size"
        self._limit = self._largest

    @property
    def size(self) -> int:
        """The batch size decided last."""
        return self._size

    def observe(self, observation: Observation) -> None:
        """Take note of a period, and settle what `decide` answers."""
        size, reason = self.propose(observation)
        self._limit = memory_limit(observation)
        if size > self._size and observation.telemetry is not None:
            restraint = self._restraint(observation.telemetry)
            if restraint:
                size, reason = self._size, restraint
        size = min(max(size, self._smallest), self._largest)
        if size > self._limit:
            size, reason = self._limit, f"memory allows {self._limit}"
        self._size, self._reason = size, reason

    def decide(self) -> Decision:
        return Decision(self._size, self._reason)

    @abstractmethod
    def propose(self, observation: Observation) -> tuple[int, str]:
        """The size this strategy wants now, and why."""

    def _restraint(self, device: Readings) -> str:
        """Why the device should not get a larger batch now; "" where nothing speaks against it."""
        hot_c, power_w = self.params.get("hot_c", math.inf), self.params.get("power_w") or math.inf
        if device.throttled:
            return "the device throttles itself; a larger batch would only heat it"
        if device.temperature_c is not None and device.temperature_c >= hot_c:
            return f"the device has {device.temperature_c:.0f} degrees"
        if device.power_w is not None and device.power_w >= power_w:
            return f"the device draws {device.power_w:.0f} W"
        free_bytes, reserve_bytes = device.memory_free_bytes, self.params.get("reserve_mb", 0) * 2**20
        if free_bytes is not None and free_bytes < reserve_bytes:
            return f"only {free_bytes / 2**20:.0f} MB of memory are free"
        return ""

    def is_full(self, observation: Observation) -> bool:
        """Whether the size is what holds work back: the batch is full, and more wait."""
        return observation.num_waiting > 0 and observation.num_running >= self._size
