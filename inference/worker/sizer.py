"""Lets a sizing strategy set the batch size while the engine serves: what it sees, when it looks, what it changed."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from inference.messages import DeploymentSpec, LatencyTarget, SizeChange, Telemetry
from inference.worker.active import ActiveRequest
from inference.worker.batch import Batch
from inference.worker.costs import StepCosts
from inference.worker.meters import Meters
from scheduling.core.sizing.controller import Controller, Readings
from scheduling.core.sizing.cost_model import StepCost
from scheduling.core.sizing.observer import PERIOD_S, Served, SizingObserver, Work
from scheduling.core.sizing.strategies import SIZINGS, build_sizing

SHOWN_CHANGES = 8


class Sizer:
    """Owned by the loop. `tick` is called in every turn and does something once in PERIOD_S.

    The size of `fixed` is the operator's; nothing but lack of memory moves it, and it comes back.
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
        self._bound: int | None = None
        """What memory allowed at the last look."""
        self.changes: deque[SizeChange] = deque(maxlen=SHOWN_CHANGES)
        """The latest, newest last."""
        self.set_targets(deployment.targets)
        self._looked_s = clock()
        self._observer = SizingObserver(planner, self._work(), self._looked_s)
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

        Where memory holds the present one down, that is what the strategy before was to begin with: `fixed` would keep
        the other for good. Raises SizingError; then nothing has changed.
        """
        first = self._present_size() if batch_size is None else batch_size
        self._controller = self._build(name, params, first)
        decision = self._controller.decide()
        self._apply(decision.batch_size, f"{name}: {decision.reason}", self._read_bound())

    def set_batch_size(self, batch_size: int) -> None:
        """An operator sets the size: `fixed` is in charge from now on. Raises SizingError."""
        self.switch("fixed", {"initial": batch_size})

    def set_targets(self, targets: Sequence[LatencyTarget]) -> None:
        """What the SLAs promise."""
        self._targets = {(target.tenant, target.priority): target for target in targets}

    def count_end(self, active: ActiveRequest, now_s: float) -> None:
        """A request ended in good order: how that compares with its SLA."""
        request = active.request
        served = Served(
            request.arrival_s,
            active.claimed_s,
            active.first_token_s,
            now_s,
            active.num_new_tokens,
            request.deadline_s,
            is_resumed=bool(active.num_resumed),
        )
        target = self._targets.get((request.tenant, request.priority)) or self._targets.get(("", request.priority))
        self._observer.count_end(served, target)

    def count_first_token(self, seconds: float) -> None:
        """A request's first token came so long after its claim."""
        self._observer.count_first_token(self._clock(), seconds)

    def count_refusal(self) -> None:
        """A server behind turned a request away, or did not answer it."""
        self._observer.count_refusal()

    def tick(self) -> None:
        """Let the strategy look at the period that is over, and follow it as far as memory allows."""
        now_s = self._clock()
        if 0 <= now_s - self._looked_s < PERIOD_S:
            return
        self._looked_s = now_s
        bound = self._read_bound()
        observation = self._observer.observe(
            self._work(),
            now_s,
            num_queued=self._num_waiting(),
            memory_batch_limit=bound,
            cost=self._costs.cost,
            telemetry=_readings(self._telemetry()),
        )
        if self.name != "fixed":
            self._controller.observe(observation)
        decision = self._controller.decide()
        self._apply(decision.batch_size, f"{self.name}: {decision.reason}", bound)

    def _present_size(self) -> int:
        size = self._planner.batch_size
        is_held_down = self._bound is not None and size >= self._bound
        return max(size, int(self._controller.params["initial"])) if is_held_down else size

    def _build(self, name: str, params: Mapping[str, Any], first: int) -> Controller:
        given = dict(params)
        if name in SIZINGS and "initial" not in given:
            defaults = SIZINGS[name].params
            smallest = _bound(given, defaults, "smallest", 1)
            largest = _bound(given, defaults, "largest", 4096)
            if smallest <= largest:
                given["initial"] = min(max(first, smallest), largest)
        return build_sizing(name, given, random=self._random)

    def _read_bound(self) -> int | None:
        """What memory allows, or did when that was last known.

        Where it grew by an eighth or less it stays as it was: readings waver, and sizes should not.
        """
        limit, before = self._memory_limit(self._telemetry()), self._bound
        if limit is not None and (before is None or limit < before or limit > before + before // 8):
            self._bound = limit
        return self._bound

    def _apply(self, batch_size: int, reason: str, bound: int | None) -> None:
        before = self._planner.max_batch_size
        if bound is not None and bound < batch_size:
            batch_size, reason = bound, f"memory allows {bound}"
        if batch_size == self._planner.batch_size:
            return
        self._planner.set_batch_size(batch_size)
        self._observer.forget()
        if self._planner.max_batch_size != before:
            change = SizeChange(self._clock(), self._planner.max_batch_size, reason)
            self.changes.append(change)
            self._meters.second.size_changes.append(change)

    def _work(self) -> Work:
        meters = self._meters
        return Work(meters.steps, meters.step_total_s, meters.output_tokens)


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
