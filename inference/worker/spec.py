"""What goes over the pipe between a Celery gpu worker and its engine process: JSON lines, the EngineSpec first."""

from typing import Any, Literal

import msgspec

from inference.logs import LogFormat
from inference.messages import DeploymentSpec
from scheduling.core.sizing.strategies import SizingError, build_sizing

LOST_STATUS = 4
"""Exit status of an engine process whose GPU is lost."""

CommandName = Literal[
    "pause", "resume", "drain", "set_mode", "set_batch_size", "policy", "sizing", "deployment", "stop"
]


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process needs to know; it reads no environment and no database."""

    deployment: DeploymentSpec
    replica: str
    redis_url: str
    key_prefix: str = "penstock"
    device: str = "auto"
    lease_s: float = 5.0
    drain_s: float = 5.0
    """How long `drain` finishes what runs before the rest goes back to the queue."""
    log_level: str = "INFO"
    log_format: LogFormat = "line"
    gpu: str = ""
    """NVML's number or UUID of the GPU to watch, and to wait for before loading; empty: the CUDA device's."""
    restarts: dict[str, int] = {}
    """How often this worker started an engine before, by reason."""


class ControlMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A command to the engine, obeyed between two steps."""

    id: int
    command: CommandName
    arguments: dict[str, Any] = {}


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag="ack"):
    """The engine obeyed the command of this id, or says why not."""

    id: int
    ok: bool
    error: str = ""
    applied_ms: float = 0.0
    """From reading the command to having obeyed it."""
    state: str = ""


class Notice(msgspec.Struct, frozen=True, kw_only=True, tag="notice"):
    """A change of the engine process that its parent should know."""

    state: Literal["ready", "failed", "stopped"]
    detail: str = ""
    gpu: str = ""
    """NVML's UUID of the GPU it runs on, so that its successor takes no other; empty on a CPU."""


class Beat(msgspec.Struct, frozen=True, kw_only=True, tag="beat"):
    """The loop turns; said once a second. Silence for long means that a step hangs."""

    owner: str = ""
    """Under what name it claims."""


Report = Ack | Notice | Beat


def find_sizing_problem(arguments: dict[str, Any]) -> str:
    """What is wrong with the arguments of a `sizing` command, in a sentence; empty where nothing is."""
    name, params = arguments.get("name"), arguments.get("params", {})
    if not isinstance(name, str) or not isinstance(params, dict):
        return "sizing needs the name of a strategy, and its parameters as an object."
    try:
        build_sizing(name, params)
    except SizingError as error:
        return str(error)
    return ""
