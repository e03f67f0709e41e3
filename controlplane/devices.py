"""What a machine can place replicas on: asked of driver and system, not of torch, which no supervisor loads."""

from importlib import metadata
from typing import Any

import psutil
import pynvml

from controlplane.config import Config
from inference.host_memory import read_host_memory
from inference.plan import Device


def read_devices(config: Config) -> list[Device]:
    """The GPUs that torch could use, and the CPU; only what PENSTOCK_DEVICE leaves. The driver may take long."""
    gpus = _read_gpus() if config.device != "cpu" and _torch_knows_cuda() else []
    gpus = [gpu for number, gpu in enumerate(gpus) if _is_visible(number, gpu.name, config.cuda_devices)]
    kind, _, number = config.device.partition(":")
    if kind == "cuda":
        return gpus[int(number) : int(number) + 1] if number else gpus
    return [*gpus, _read_cpu()]


def _is_visible(number: int, uuid: str, visible: str) -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves a GPU: it lists numbers or beginnings of UUIDs."""
    listed = [name.strip() for name in visible.split(",") if name.strip()]
    return not listed or any(name == str(number) or uuid.startswith(name) for name in listed)


def _read_cpu() -> Device:
    memory = read_host_memory()
    label = f"CPU, {psutil.cpu_count() or 1} cores"
    return Device(name="cpu", label=label, memory_total_bytes=memory.total, memory_free_bytes=memory.available)


def _torch_knows_cuda() -> bool:
    """By its version; its own word would take seconds and hundreds of megabytes."""
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _read_gpus() -> list[Device]:
    """In NVML's order; none where there is no driver, or none that answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_read_gpu(number) for number in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _read_gpu(number: int) -> Device:
    handle: Any = pynvml.nvmlDeviceGetHandleByIndex(number)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Device(
        name=str(pynvml.nvmlDeviceGetUUID(handle)),
        label=f"GPU {number}, {pynvml.nvmlDeviceGetName(handle)}",
        memory_total_bytes=int(memory.total),
        memory_free_bytes=int(memory.free),
    )
