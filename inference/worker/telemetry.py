"""What the device says of itself: NVML where there is an NVIDIA GPU, the process and its host where there is none."""

import logging
import threading
from typing import Any, Protocol

import psutil

from inference.messages import Telemetry

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
THROTTLE_REASONS = {
    "nvmlClocksThrottleReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "thermal (software)",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "thermal (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksThrottleReasonSyncBoost": "sync boost",
}


class Source(Protocol):
    """Somewhere to read telemetry."""

    def read(self) -> Telemetry:
        """One reading."""
        ...


class HostSource:
    """The engine process and its host. `utilization_percent` is this process's, of all cores; memory is the host's."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._process = psutil.Process()
        self._num_cores = psutil.cpu_count() or 1
        self._process.cpu_percent()

    def read(self) -> Telemetry:
        """One reading; utilization since the one before."""
        memory = psutil.virtual_memory()
        return Telemetry(
            source="host",
            device=self._device,
            utilization_percent=round(self._process.cpu_percent() / self._num_cores, 1),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            temperature_c=_cpu_temperature(),
        )


class NvmlSource:
    """One NVIDIA GPU. A field that this GPU or driver does not give is None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        name = nvml.nvmlDeviceGetName(handle)
        self._device = name.decode() if isinstance(name, bytes) else str(name)

    def read(self) -> Telemetry:
        """One reading."""
        nvml = self._nvml
        utilization = self._ask("nvmlDeviceGetUtilizationRates")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        power_mw = self._ask("nvmlDeviceGetPowerUsage")
        mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return Telemetry(
            source="nvml",
            device=self._device,
            utilization_percent=None if utilization is None else float(utilization.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            temperature_c=self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            throttle_reasons=[text for name, text in THROTTLE_REASONS.items() if mask & getattr(nvml, name, 0)],
        )

    def _ask(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle, *args)
        except self._nvml.NVMLError:
            return None


def open_source(device: str) -> Source:
    """NVML for a CUDA device such as `cuda` or `cuda:1`, the host for any other and where NVML cannot be used."""
    if device.startswith("cuda"):
        try:
            import pynvml

            pynvml.nvmlInit()
            return NvmlSource(pynvml, _find_gpu(pynvml, int(device.partition(":")[2] or 0)))
        except Exception as error:  # NVML raises its own classes, made as it runs, and ctypes raises OSError
            logger.warning("No NVML telemetry (%s); the host's is shown.", error)
    return HostSource(device)


def _find_gpu(nvml: Any, index: int) -> Any:
    """The handle of torch's device `index`, which CUDA_VISIBLE_DEVICES may have renumbered: found by PCI address."""
    import torch

    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())


def _cpu_temperature() -> float | None:
    """The hottest sensor of the processor, where the system shows one."""
    if not hasattr(psutil, "sensors_temperatures"):
        return None
    try:
        sensors = psutil.sensors_temperatures()
    except OSError:
        return None
    readings = [s.current for name in ("coretemp", "k10temp", "cpu_thermal") for s in sensors.get(name, [])]
    return max(readings, default=None)


class TelemetryReader(threading.Thread):
    """Reads a source twice a second in a thread of its own; a driver call may take long."""

    def __init__(self) -> None:
        super().__init__(name="telemetry", daemon=True)
        self._source: Source = HostSource()
        self._latest: Telemetry | None = None

    def follow(self, source: Source) -> None:
        """Read this source from now on, in place of the host."""
        self._source = source

    def read(self) -> Telemetry | None:
        """The latest reading; None before the first."""
        return self._latest

    def run(self) -> None:
        """Read as long as the process lives."""
        pause = threading.Event()
        while not pause.wait(PERIOD_S):
            self._latest = self._source.read()
