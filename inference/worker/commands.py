"""Control commands as the loop obeys them, between two steps."""

from collections.abc import Callable
from typing import Any, get_args

import msgspec

from inference.messages import BatchMode, DeploymentSpec
from inference.worker.batch import Batch
from inference.worker.gate import Gate
from inference.worker.sizer import Sizer
from inference.worker.spec import ControlMessage, find_sizing_problem
from scheduling.core.sizing.strategies import SizingError
from scheduling.core.triggers import TriggerError, parse_trigger


class CommandRefusedError(Exception):
    """A command's arguments cannot be used."""


class Controls:
    """What commands move: the gate, the planner, the sizing, and the policy that is shown."""

    def __init__(
        self,
        gate: Gate,
        planner: Batch,
        sizer: Sizer,
        announce: Callable[[str, int], None],
        *,
        deployment: DeploymentSpec,
        drain_s: float,
        adopted: Callable[[DeploymentSpec], None] = lambda _: None,
    ) -> None:
        """`announce` gets name and revision of a policy that was switched on, `adopted` a deployment's new settings."""
        self._gate = gate
        self._planner = planner
        self._sizer = sizer
        self._deployment = deployment
        self._announce = announce
        self._adopted = adopted
        self._drain_s = drain_s

    def obey(self, message: ControlMessage) -> None:
        """Carry out one command. Raises CommandRefusedError."""
        arguments = message.arguments
        match message.command:
            case "pause":
                self._gate.pause()
            case "resume":
                self._gate.resume()
            case "drain":
                self._gate.drain(_number(arguments, "drain_s", self._drain_s))
            case "stop":
                self._gate.end(_number(arguments, "drain_s", self._drain_s))
            case "set_mode":
                self._planner.set_mode(_mode(arguments.get("mode")))
            case "set_batch_size":
                self._sizer.set_batch_size(_batch_size(arguments.get("max_batch_size")))
            case "sizing":
                self._switch_sizing(arguments)
            case "deployment":
                self._adopt(_deployment(arguments))
            case "policy":
                self._announce(str(arguments.get("name", "")), int(_number(arguments, "revision", 0)))

    def _switch_sizing(self, arguments: dict[str, Any]) -> None:
        if problem := find_sizing_problem(arguments):
            raise CommandRefusedError(problem)
        try:
            self._sizer.switch(arguments["name"], arguments.get("params", {}))
        except SizingError as error:
            raise CommandRefusedError(str(error)) from error

    def _adopt(self, deployment: DeploymentSpec) -> None:
        """Take up what has changed of the deployment and needs no other model or memory; see LIVE_FIELDS."""
        before, planner = self._deployment, self._planner
        try:
            trigger = parse_trigger(deployment.triggers)
            sized = ("sizing", "sizing_params", "max_batch_size")
            if any(getattr(before, name) != getattr(deployment, name) for name in sized):
                self._sizer.switch(
                    deployment.sizing, deployment.sizing_params, batch_size=_batch_size(deployment.max_batch_size)
                )
        except (SizingError, TriggerError) as error:
            raise CommandRefusedError(str(error)) from error
        if before.mode != deployment.mode:
            planner.set_mode(deployment.mode)
        planner.set_trigger(trigger)
        planner.long_prefill_threshold = deployment.long_prefill_threshold
        self._sizer.set_targets(deployment.targets)
        self._deployment = deployment
        self._adopted(deployment)


def _deployment(arguments: dict[str, Any]) -> DeploymentSpec:
    try:
        return msgspec.convert(arguments, DeploymentSpec)
    except msgspec.ValidationError as error:
        raise CommandRefusedError(f"The deployment cannot be read: {error}") from error


def _number(arguments: dict[str, Any], name: str, default: float) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise CommandRefusedError(f"{name} must be a number of at least 0, not {value!r}.")
    return value


def _mode(value: Any) -> BatchMode:
    modes = get_args(BatchMode)
    if value not in modes:
        raise CommandRefusedError(f"mode must be one of {', '.join(modes)}, not {value!r}.")
    return value  # type: ignore[no-any-return]


def _batch_size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 4096:
        raise CommandRefusedError(f"max_batch_size must be a whole number from 1 to 4096, not {value!r}.")
    return value
