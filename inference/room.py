"""Whether a machine has memory for one more replica: what one needs, and what those that run have not taken yet."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.checkpoint import DTYPE_BYTES, CheckpointError, inspect_checkpoint, read_text_config
from inference.messages import DeploymentSpec, ReplicaStatus
from inference.plan import Device, Machine, Plan
from scheduling.core.sizing.memory_model import BatchShape, MemoryModel, ModelConfigError, ModelShape

logger = logging.getLogger(__name__)

MAX_REPLICAS = 64
"""On one machine."""
RUNTIME_BYTES = 512 * 2**20
"""What torch and the driver hold beside weights and cache, as `MemoryModel` has it until it measured."""
HOST_FRACTION = 0.25
"""Of the free host memory, what a KV cache takes at most where it is not given a size; the engine has the same."""
UPSTREAM_BYTES = 128 * 2**20
"""What the process of a replica takes that only forwards."""
GIB = 2**30


class NoRoom(Exception):  # noqa: N818
    """A replica cannot be placed there; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes that a replica takes."""

    weights: int
    kv: int
    rest: int
    """Activations, and what the runtime holds."""
    kv_token: int = 0
    """Of the KV cache, for one token."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.rest

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.2f} GiB (weights {self.weights / GIB:.2f}, KV cache {self.kv / GIB:.2f}, "
            f"the rest {self.rest / GIB:.2f})"
        )


def estimate_need(spec: DeploymentSpec, *, num_parameters: int | None, device: Device) -> Need:
    """By the memory model of the checkpoint; from the number of parameters alone where its files are not here.

    The KV cache is as large as the engine would make it, and on a GPU, where it takes what is left, one sequence long.
    """
    if spec.is_upstream:  # its memory is another server's
        return Need(weights=0, kv=0, rest=UPSTREAM_BYTES)
    on_gpu = device.name != "cpu"
    dtype = spec.dtype if spec.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    config = _read_config(Path(spec.path))
    try:
        shape = ModelShape.from_config(config, num_parameters=num_parameters or 1, dtype=dtype)
    except ModelConfigError as error:
        logger.info("The memory of %s is estimated from its weights alone: %s", spec.name, error)
        weights = (num_parameters or 0) * (2 if dtype in ("bfloat16", "float16") else 4)
        return Need(weights=_rounded(weights, spec, dtype), kv=spec.kv_memory_bytes, rest=RUNTIME_BYTES)
    length = spec.max_model_len or _context_length(config)
    batch = BatchShape(batch_size=1, tokens_per_sequence=length, step_tokens=spec.step_tokens)
    estimate = MemoryModel(shape, overhead_bytes=RUNTIME_BYTES).estimate(batch)
    kv = spec.kv_memory_bytes or estimate.kv
    if not spec.kv_memory_bytes and not on_gpu:
        kv = max(kv, min(estimate.kv * spec.max_batch_size, int(device.memory_free_bytes * HOST_FRACTION)))
    draft_weights, draft_token = _estimate_draft(spec, dtype)
    if not spec.kv_memory_bytes:  # else that is for both
        kv += kv * draft_token // shape.kv_bytes_per_token
    return Need(
        weights=_rounded(estimate.weights if num_parameters else 0, spec, dtype) + draft_weights,
        kv=kv,
        rest=estimate.activations + estimate.fragmentation,
        kv_token=shape.kv_bytes_per_token + draft_token,
    )


def _estimate_draft(spec: DeploymentSpec, dtype: str) -> tuple[int, int]:
    """Bytes of a draft model, and of its keys and values for one token; nothing where its files are not here."""
    if spec.speculation != "model":
        return 0, 0
    try:
        info = inspect_checkpoint(Path(spec.draft_path), needs_tokenizer=False)
    except CheckpointError:
        return 0, 0
    return info.num_parameters * DTYPE_BYTES[dtype], info.kv_bytes_per_token(dtype)


def _rounded(weights: int, spec: DeploymentSpec, dtype: str) -> int:
    """In int8 they take a byte each, whatever `dtype` had been, and a third for embeddings and scales."""
    return weights * 4 // (3 * DTYPE_BYTES[dtype]) if spec.quantization == "int8" else weights


def _context_length(config: Mapping[str, Any]) -> int:
    length = config.get("max_position_embeddings") or config.get("n_positions")
    return length if type(length) is int and length > 0 else 2048


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_text_config(path)
    except CheckpointError:
        return {}


def check_room(machine: Machine, device: Device, *, need: Need, promised: Mapping[str, int]) -> None:
    """Raise NoRoom where the device has not got the memory beside what is `promised` to others, in bytes by replica."""
    if len(machine.replicas) >= MAX_REPLICAS:
        raise NoRoom(f"{machine.name} runs {len(machine.replicas)} replicas, and may run {MAX_REPLICAS}.")
    free = max(0, device.memory_free_bytes - sum(promised.values()))
    if need.total > free:
        waiting = [name for name, num_bytes in sorted(promised.items()) if num_bytes]
        others = f" beside what {', '.join(waiting)} may still take" if waiting else ""
        raise NoRoom(
            f"There is no room on {machine.name}, {device.label}: a replica needs {need}, and {free / GIB:.2f} GiB are "
            f"free{others}. Choose another place, or remove a replica there first."
        )


def find_device(machine: Machine, name: str) -> Device:
    """A device of a machine; `auto` is a GPU before the CPU, the one with the most free memory. Raises NoRoom."""
    if not machine.devices:
        raise NoRoom(f"{machine.name} has not said yet which devices it has. Try again in a few seconds.")
    if name == "auto":
        return max(machine.devices, key=lambda device: (device.name != "cpu", device.memory_free_bytes))
    for device in machine.devices:
        if device.name == name:
            return device
    there = ", ".join(f"{device.name} ({device.label})" for device in machine.devices)
    raise NoRoom(f"{machine.name} has no device {name}; it has {there}.")


def promised_bytes(
    machine: Machine, device: Device, *, plan: Plan, statuses: Mapping[str, ReplicaStatus], needs: Mapping[str, Need]
) -> dict[str, int]:
    """By replica on this device: what it will take, and has not taken yet. `needs` are by model.

    One that was added a moment ago has not loaded its weights, and a CPU's activations come and go with its steps.
    """
    promised: dict[str, int] = {}
    for name, model in _placed_on(machine, device, plan):
        status = statuses.get(name)
        need = needs.get(status.model if status else model)
        if need is None:
            continue
        telemetry = status.telemetry if status and status.state != "starting" else None
        if status is None or telemetry is None:
            promised[name] = need.total
        elif telemetry.source != "nvml":  # on a GPU all that is reserved is taken
            cache = need.kv_token * status.kv_blocks_total * status.kv_block_size
            promised[name] = max(0, need.weights + need.rest + cache - (telemetry.process_memory_bytes or 0))
    return promised


def _placed_on(machine: Machine, device: Device, plan: Plan) -> Iterable[tuple[str, str]]:
    """Names and models of the replicas that run there, or will."""
    here = {replica.name: (replica.device, replica.model) for replica in machine.replicas}
    for planned in plan.replicas.values():
        if planned.machine == machine.name and planned.model and planned.wanted == "running":
            here.setdefault(planned.name, (planned.device, planned.model))
    return [(name, model) for name, (where, model) in here.items() if _resolve(machine, where) == device.name]


def _resolve(machine: Machine, device: str) -> str:
    """The device that torch takes for a name: `cuda:1` is the second GPU, `auto` the first one where there are any."""
    gpus = [found.name for found in machine.devices if found.name != "cpu"]
    kind, _, number = device.partition(":")
    if kind == "cuda" or (kind == "auto" and gpus):
        return gpus[int(number or 0)] if int(number or 0) < len(gpus) else device
    return "cpu" if kind == "auto" else device
