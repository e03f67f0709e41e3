"""Lets a sizing strategy set the batch size while the engine serves: what it sees, when it looks, what it changed."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from statistics import median
from typing import Any

from inference.messages import DeploymentSpec, LatencyTarget, SizeChange, Telemetry
from inference.worker.active import ActiveRequest
from inference.worker.batch import Batch
from inference.worker.costs import StepCosts
from inference.worker.meters import Meters
from scheduling.core.sizing.controller import Controller, Observation, Readings
from scheduling.core.sizing.cost_model import StepCost
from scheduling.core.sizing.strategies import SIZINGS, build_sizing

PERIOD_S = 0.25
"""Between two looks of a strategy."""
LATENCY_WINDOW = 256
"""Ended requests over which the p99 is taken."""
LATENCY_KEEP_S = 30.0
SHOWN_CHANGES = 8
FIRST_TOKENS = 32
"""First tokens over which the median is taken."""
NO_BLOCKS = 2**31 - 1
"""What stands for the KV blocks of a cache that is not ours: no size is bounded by them."""


class Sizer:
    """Owned by the loop. `tick` is called in every turn and does something once in PERIOD_S.

    A strategy judges by what a smaller batch can mend: latencies count from the claim, as a share of what the SLA
    promises from the arrival. Those of requests that ended under an earlier size are forgotten when the size changes.
    The size of `fixed` is the operator's, and is moved by nobody.
    """

    def __init__(
        self,
        planner: Batch,
        meters: Meters,
        costs: StepCosts,
        *,
        deployment: DeploymentSpec,
        num_waiting: Callable[[], int],
        telemetry: Callable[[], Telemetry | None],
        memory_limit: Callable[[Telemetry | None], int | None],
        clock: Callable[[], float] = time.time,
        random: Random | None = None,
    ) -> None:
        """`num_waiting`: requests in the fleet queue. Raises SizingError for a deployment that cannot be sized."""
        self._planner = planner
        self._meters = meters
        self._costs = costs
        self._num_waiting = num_waiting
        self._telemetry = telemetry
        self._memory_limit = memory_limit
        self._clock = clock
        self._random = random or Random()  # noqa: S311
        self._ratios: deque[tuple[float, float]] = deque(maxlen=LATENCY_WINDOW)
        self._first_s: deque[tuple[float, float]] = deque(maxlen=FIRST_TOKENS)
        self._good_tokens = 0
        self._num_refused = 0
        self.changes: deque[SizeChange] = deque(maxlen=SHOWN_CHANGES)
        """The latest, newest last."""
        self.set_targets(deployment.targets)
        self._begin_period(clock())
        self.switch(deployment.sizing, deployment.sizing_params, batch_size=deployment.max_batch_size)

    @property
    def name(self) -> str:
        """The strategy in charge."""
        return self._controller.name

    @property
    def cost(self) -> StepCost | None:
        """What a step costs, as learned so far."""
        return self._costs.cost

    @property
    def params(self) -> dict[str, float]:
        """Its parameters, all of them."""
        return dict(self._controller.params)

    def switch(self, name: str, params: Mapping[str, Any], *, batch_size: int | None = None) -> None:
        """Put another strategy in charge, at once. It begins with `batch_size`, or with the present one.

        Raises SizingError; then nothing has changed.
        """
        first = self._planner.batch_size if batch_size is None else batch_size
        self._controller = self._build(name, params, first)
        decision = self._controller.decide()
        self._apply(decision.batch_size, f"{name}: {decision.reason}")

    def set_batch_size(self, batch_size: int) -> None:
        """An operator sets the size: `fixed` is in charge from now on. Raises SizingError."""
        self.switch("fixed", {"initial": batch_size})

    def set_targets(self, targets: Sequence[LatencyTarget]) -> None:
        """What the SLAs promise."""
        self._targets = {(target.tenant, target.priority): target for target in targets}

    def count_end(self, active: ActiveRequest, now_s: float) -> None:
        """A request ended in good order: how that compares with its SLA."""
        request, first_s = active.request, active.first_token_s
        target = self._targets.get((request.tenant, request.priority)) or self._targets.get(("", request.priority))
        e2e_s = target.e2e_s if target else None
        if request.deadline_s is not None:
            e2e_s = request.deadline_s - request.arrival_s
        ttft_s = target.ttft_s if target and not active.num_resumed else None
        pairs = ((first_s, ttft_s), (now_s, e2e_s))
        known = [(end_s, limit_s) for end_s, limit_s in pairs if end_s is not None and limit_s is not None]
        if all(end_s - request.arrival_s <= limit_s for end_s, limit_s in known):
            self._good_tokens += active.num_new_tokens
        if known:
            ratio = max((end_s - active.claimed_s) / max(limit_s, 1e-3) for end_s, limit_s in known)
            self._ratios.append((now_s, ratio))

    def count_first_token(self, seconds: float) -> None:
        """A request's first token came so long after its claim."""
        self._first_s.append((self._clock(), seconds))

    def count_refusal(self) -> None:
        """A server behind turned a request away, or did not answer it."""
        self._num_refused += 1

    def tick(self) -> None:
        """Let the strategy look at the period that is over, and follow it."""
        now_s = self._clock()
        if 0 <= now_s - self._since_s < PERIOD_S:
            return
        observation = self._observe(now_s)
        self._begin_period(now_s)
        if self.name == "fixed":
            return
        self._controller.observe(observation)
        decision = self._controller.decide()
        self._apply(decision.batch_size, f"{self.name}: {decision.reason}")

    def _build(self, name: str, params: Mapping[str, Any], first: int) -> Controller:
        given = dict(params)
        if name in SIZINGS and "initial" not in given:
            defaults = SIZINGS[name].params
            smallest = _bound(given, defaults, "smallest", 1)
            largest = _bound(given, defaults, "largest", 4096)
            if smallest <= largest:
                given["initial"] = min(max(first, smallest), largest)
        return build_sizing(name, given, random=self._random)

    def _apply(self, batch_size: int, reason: str) -> None:
        before = self._planner.max_batch_size
        limit = self._memory_limit(self._telemetry())
        if limit is not None and limit < batch_size:
            batch_size, reason = limit, f"memory allows {limit}"
        if batch_size == self._planner.batch_size:
            return
        self._planner.set_batch_size(batch_size)
        self._ratios.clear()
        self._first_s.clear()
        if self._planner.max_batch_size != before:
            change = SizeChange(self._clock(), self._planner.max_batch_size, reason)
            self.changes.append(change)
            self._meters.second.size_changes.append(change)

    def _begin_period(self, now_s: float) -> None:
        meters = self._meters
        self._since_s = now_s
        self._good_tokens = 0
        self._num_refused = 0
        self._before = (meters.steps, meters.step_total_s, meters.output_tokens, self._planner.num_preemptions)

    def _observe(self, now_s: float) -> Observation:
        planner, meters = self._planner, self._meters
        steps, step_s, tokens, preemptions = self._before
        steps, step_s = meters.steps - steps, meters.step_total_s - step_s
        for kept in (self._ratios, self._first_s):
            while kept and now_s - kept[0][0] > LATENCY_KEEP_S:
                kept.popleft()
        ratios = sorted(ratio for _, ratio in self._ratios)
        running = planner.sequences[: planner.num_running]
        telemetry = self._telemetry()
        return Observation(
            now_s=now_s,
            seconds=max(1e-3, now_s - self._since_s),
            steps=steps,
            step_s=step_s / steps if steps else 0.0,
            tokens=meters.output_tokens - tokens,
            good_tokens=self._good_tokens,
            num_running=len(running),
            num_waiting=planner.num_waiting + self._num_waiting(),
            p99_s=ratios[int(0.99 * (len(ratios) - 1))] if ratios else None,
            target_s=1.0 if ratios else None,
            preemptions=planner.num_preemptions - preemptions,
            kv_blocks_used=planner.allocator.used,
            kv_blocks_total=planner.allocator.num_blocks or NO_BLOCKS,
            memory_batch_limit=self._memory_limit(telemetry),
            cost=self._costs.cost,
            mean_context_tokens=sum(len(s.tokens) for s in running) / len(running) if running else 0.0,
            telemetry=_readings(telemetry),
            first_token_s=median(seconds for _, seconds in self._first_s) if self._first_s else None,
            refusals=self._num_refused,
        )


def _bound(given: Mapping[str, Any], defaults: Mapping[str, float], name: str, otherwise: int) -> int:
    value = given.get(name, defaults.get(name, otherwise))
    return int(value) if isinstance(value, int | float) else otherwise


def _readings(telemetry: Telemetry | None) -> Readings | None:
    if telemetry is None or telemetry.stale_s:
        return None
    total, used = telemetry.memory_total_bytes, telemetry.memory_used_bytes
    return Readings(
        utilization_percent=telemetry.utilization_percent,
        memory_free_bytes=None if total is None or used is None else total - used,
        temperature_c=telemetry.temperature_c,
        power_w=telemetry.power_w,
        throttled=bool(telemetry.throttle_reasons),
    )
