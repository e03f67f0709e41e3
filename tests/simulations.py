"""Requests and settings of simulations."""

from dataclasses import replace
from typing import Any

from scheduling.core.policies import build_policy
from scheduling.core.simulation.outcome import ServiceTarget, ServiceTargets
from scheduling.core.simulation.settings import SimulationSettings
from scheduling.core.simulation.trace import TraceRequest

TARGETS = ServiceTargets(default=ServiceTarget(ttft_s=0.5, e2e_s=2.0))


def request(arrival_s: float, tenant: str = "a", prompt: int = 20, output: int = 5, **more: Any) -> TraceRequest:
    return TraceRequest(arrival_s, tenant, prompt, output, **{"max_tokens": output, **more})


def fleet(**changes: Any) -> SimulationSettings:
    base = SimulationSettings(
        policy=build_policy("fifo"), batch_size=4, num_blocks=200, step_tokens=64, targets=TARGETS
    )
    return replace(base, **changes)
