"""One NVIDIA GPU, or one MIG instance of it, as NVML shows it; through the bindings of nvidia-ml-py."""

import os
import time
from typing import Any

import pynvml

from inference.messages import ProcessMemory, Telemetry

MAX_PROCESSES = 16
THROTTLE_REASONS = {
    pynvml.nvmlClocksThrottleReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksThrottleReasonSyncBoost: "sync boost",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "thermal (software)",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "thermal (hardware)",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
}
LOST = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
"""Words of the driver after which no kernel runs on this GPU again without an operator or a reset."""
MISSING = (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT, pynvml.NVML_ERROR_GPU_NOT_FOUND)
"""Said of a UUID or number that NVML does not know, also of a GPU that fell off the bus before NVML was started."""


class GpuLostError(Exception):
    """The GPU is lost."""


class NvmlUnavailableError(Exception):
    """There is no NVML here, or it does not know the GPU."""


class NvmlSource:
    """Reads one GPU. A field that this GPU, driver or instance does not give is None."""

    def __init__(self, gpus: tuple[str, ...]) -> None:
        """The first of `gpus` (UUIDs or NVML's numbers) that there is; one that stands alone must be there.

        Raises GpuLostError or NvmlUnavailableError.
        """
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailableError(f"No NVML telemetry: {error}.") from None
        try:
            self._open(gpus)
        except pynvml.NVMLError as error:
            self.close()
            if error.value in LOST or (len(gpus) == 1 and error.value in MISSING):
                raise GpuLostError(f"GPU {gpus[0]} is lost: {error}.") from None
            raise NvmlUnavailableError(f"No NVML telemetry of GPU {gpus[0]}: {error}.") from None

    def _open(self, gpus: tuple[str, ...]) -> None:
        self._handle = _find(gpus)
        self._gpu = self._handle
        """The whole GPU, which alone knows of power, clocks, temperature and ECC."""
        self._mig = ""
        is_mig = self._ask("nvmlDeviceIsMigDeviceHandle")  # older drivers do not know of it
        if is_mig is not None and is_mig.value:
            self._gpu = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle)
            ids = [self._ask("nvmlDeviceGetGpuInstanceId"), self._ask("nvmlDeviceGetComputeInstanceId")]
            self._mig = "instance {}, compute {}".format(*("?" if number is None else number for number in ids))
        self.uuid: str = pynvml.nvmlDeviceGetUUID(self._handle)
        self.device: str = pynvml.nvmlDeviceGetName(self._handle)

    def read(self) -> Telemetry:
        """One reading. Raises GpuLostError."""
        utilization = self._ask("nvmlDeviceGetUtilizationRates")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        processes = self._processes()
        own = [process.bytes for process in processes if process.pid == os.getpid()]
        mask = self._ask_gpu("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return Telemetry(
            source="nvml",
            device=self.device,
            uuid=self.uuid,
            mig=self._mig,
            time_s=time.time(),
            utilization_percent=None if utilization is None else float(utilization.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            temperature_c=self._ask_gpu("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
            power_w=_watts(self._ask_gpu("nvmlDeviceGetPowerUsage")),
            power_limit_w=_watts(self._ask_gpu("nvmlDeviceGetEnforcedPowerLimit")),
            sm_clock_mhz=self._ask_gpu("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask_gpu("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
            ecc_corrected=self._count_errors(pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ecc_uncorrected=self._count_errors(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            process_memory_bytes=own[0] if own else None,
            processes=processes[:MAX_PROCESSES],
            throttle_reasons=[text for bit, text in THROTTLE_REASONS.items() if mask & bit],
        )

    def close(self) -> None:
        """Let NVML go; a lost GPU can be found again only after a new start of it."""
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            return

    def _processes(self) -> list[ProcessMemory]:
        found = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        processes = [ProcessMemory(int(process.pid), process.usedGpuMemory) for process in found]
        return sorted(processes, key=lambda process: -(process.bytes or 0))

    def _count_errors(self, kind: int) -> int | None:
        count: int | None = self._ask_gpu("nvmlDeviceGetTotalEccErrors", kind, pynvml.NVML_VOLATILE_ECC)
        return count

    def _ask(self, name: str, *arguments: Any) -> Any:
        return _ask(name, self._handle, *arguments)

    def _ask_gpu(self, name: str, *arguments: Any) -> Any:
        return _ask(name, self._gpu, *arguments)


def _ask(name: str, handle: Any, *arguments: Any) -> Any:
    """What the driver answers; None where it has no answer. Raises GpuLostError."""
    try:
        return getattr(pynvml, name)(handle, *arguments)
    except pynvml.NVMLError as error:
        if error.value in LOST:
            raise GpuLostError(f"The GPU is lost: {error}.") from None
        return None


def _find(gpus: tuple[str, ...]) -> Any:
    """The handle of the first that there is. Raises NVMLError."""
    for gpu in gpus[:-1]:
        try:
            return _find_one(gpu)
        except pynvml.NVMLError_NotFound:
            continue
    return _find_one(gpus[-1])


def _find_one(gpu: str) -> Any:
    if gpu.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(gpu))
    return pynvml.nvmlDeviceGetHandleByUUID(gpu)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def torch_gpus(device: str) -> tuple[str, ...]:
    """NVML's possible names of torch's device, such as `cuda:1`, which CUDA_VISIBLE_DEVICES may have renumbered."""
    import torch

    uuid = str(torch.cuda.get_device_properties(int(device.partition(":")[2] or 0)).uuid)
    return (f"GPU-{uuid}", f"MIG-{uuid}")
