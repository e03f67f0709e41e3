"""What a simulation is told of the fleet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from scheduling.core.planner import Mode
from scheduling.core.policy import Policy
from scheduling.core.simulation.admission import AdmissionSettings
from scheduling.core.simulation.outcome import ServiceTargets
from scheduling.core.simulation.replica import SwapSettings
from scheduling.core.sizing.controller import Sizing
from scheduling.core.sizing.observer import PERIOD_S
from scheduling.core.triggers import Trigger


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """A fleet: its policy, its replicas, and what each of them may hold."""

    policy: Policy
    num_replicas: int = 1
    mode: Mode = "continuous"
    trigger: Trigger | None = None
    """What starts the batches of `dynamic` and `static`; None for the mode's own way."""
    batch_size: int = 64
    step_tokens: int = 2048
    long_prefill_threshold: int = 0
    """Most tokens of one prompt in a step while others run; 0 sets no limit."""
    num_blocks: int = 16_384
    block_size: int = 16
    max_model_len: int = 1_000_000
    prefix_cache: bool = True
    """Whether a preempted sequence finds what it had computed, as far as its blocks were not taken since."""
    targets: ServiceTargets = field(default_factory=ServiceTargets)
    sizing: Callable[[int], Sizing] | None = None
    """Makes the controller of a replica from its number; None keeps the batch size."""
    control_period_s: float = PERIOD_S
    """Between two looks of a controller."""
    admission: AdmissionSettings | None = None
    """None admits everything."""
    swap: SwapSettings | None = None
    """None recomputes what is preempted."""
    claim_s: float = 0.0
    """From a request's arrival, where an engine has room for it, until the engine holds it: the way through the queue.

    While the engine computes, this passes beside a step.
    """
    pace: Sequence[float] = ()
    """How many times as long steps take as the cost says, in each second of the trace: what else the machine did then.

    1 after its end.
    """
    fast_forward: bool = True
    """Takes runs of like steps at once; without, the result is the same and later."""

    def __post_init__(self) -> None:
        if self.num_replicas < 1 or self.control_period_s <= 0:
            raise ValueError("A fleet has at least one replica, and controls it at intervals above 0 s.")
        if self.claim_s < 0:
            raise ValueError("A claim takes 0 s or longer.")
        if not all(0 < factor < inf for factor in self.pace):
            raise ValueError("A pace is a factor above 0 for each second.")
