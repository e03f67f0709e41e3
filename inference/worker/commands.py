"""Control commands as the loop obeys them, between two steps."""

from collections.abc import Callable
from typing import Any, get_args

from inference.messages import BatchMode
from inference.worker.gate import Gate
from inference.worker.spec import ControlMessage
from scheduling.core.planner import StepPlanner


class CommandRefusedError(Exception):
    """A command's arguments cannot be used."""


class Controls:
    """What commands move: the gate, the planner, and the policy that is shown."""

    def __init__(self, gate: Gate, planner: StepPlanner, announce: Callable[[str, int], None], drain_s: float) -> None:
        """`announce` gets name and revision of a policy that was switched on."""
        self._gate = gate
        self._planner = planner
        self._announce = announce
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
                self._planner.set_batch_size(_batch_size(arguments.get("max_batch_size")))
            case "policy":
                self._announce(str(arguments.get("name", "")), int(_number(arguments, "revision", 0)))


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
