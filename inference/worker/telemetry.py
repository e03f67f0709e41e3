"""What the device says of itself: NVML where there is an NVIDIA GPU, the process and its host where there is none."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import psutil

from inference.host_memory import read_host_memory
from inference.messages import Telemetry
from inference.worker.nvml import GpuLostError, NvmlSource, NvmlUnavailableError

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
STALE_S = 3 * PERIOD_S
"""A reading that is older shows its age: the driver hangs."""
LOST_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses between looks for a GPU that is lost."""


class Source(Protocol):
    """Somewhere to read telemetry."""

    def read(self) -> Telemetry:
        """One reading. Raises GpuLostError."""
        ...

    def close(self) -> None:
        """Read no more."""
        ...


class HostSource:
    """The engine process and its host. `utilization_percent` is this process's, of all cores; memory is the host's.

    In a container that is allowed less memory, it is the container's.
    """

    def __init__(self, device: str = "cpu", detail: str = "") -> None:
        self._device = device
        self._detail = detail
        self._process = psutil.Process()
        self._num_cores = psutil.cpu_count() or 1
        self._process.cpu_percent()

    def read(self) -> Telemetry:
        """One reading; utilization since the one before."""
        memory = read_host_memory()
        return Telemetry(
            source="host",
            device=self._device,
            detail=self._detail,
            time_s=time.time(),
            utilization_percent=round(self._process.cpu_percent() / self._num_cores, 1),
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            temperature_c=_cpu_temperature(),
            process_memory_bytes=self._process.memory_info().rss,
        )

    def close(self) -> None:
        """There is nothing to let go."""


def open_source(device: str, gpus: tuple[str, ...]) -> Source:
    """NVML for the first of `gpus` that there is, the host where there are none or no NVML. Raises GpuLostError."""
    if not gpus:
        return HostSource(device)
    try:
        return NvmlSource(gpus)
    except NvmlUnavailableError as error:
        logger.warning("%s The host's is shown.", error)
        return HostSource(device, str(error))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Followed:
    """What is read, and who hears of its loss."""

    device: str
    gpus: tuple[str, ...]
    on_loss: Callable[[str], None] | None


class TelemetryReader(threading.Thread):
    """Opens and reads a source twice a second in a thread of its own: a call to the driver may hang, a step may not."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        super().__init__(name="telemetry", daemon=True)
        self._clock = clock
        self._wanted = _Followed(device="cpu", gpus=(), on_loss=None)
        self._followed: _Followed | None = None
        self._source: Source | None = None
        self._latest: Telemetry | None = None
        self._num_misses = 0
        self._is_failing = False
        self._answered = threading.Event()
        self._wake = threading.Event()

    def follow(self, device: str, gpus: tuple[str, ...], on_loss: Callable[[str], None] | None = None) -> None:
        """Read this device from now on: by NVML under one of these names, or as a part of the host.

        `on_loss` is called once, by the reader's thread and with a sentence, when the GPU is lost.
        """
        self._answered.clear()
        self._wanted = _Followed(device=device, gpus=gpus, on_loss=on_loss)
        self._wake.set()

    def read(self) -> Telemetry | None:
        """The latest reading, with its age where the next is overdue; None before the first."""
        latest = self._latest
        if latest is None:
            return None
        age_s = self._clock() - latest.time_s
        overdue = age_s > STALE_S + (self._pause_s if self._num_misses else 0.0)
        return msgspec.structs.replace(latest, stale_s=round(age_s, 1)) if overdue else latest

    def first(self, timeout_s: float) -> Telemetry | None:
        """The first reading of what is followed; None where the driver has not answered within `timeout_s`."""
        return self._latest if self._answered.wait(timeout_s) else None

    def run(self) -> None:
        """Read as long as the process lives."""
        while True:
            self._look()
            self._wake.wait(self._pause_s)
            self._wake.clear()

    @property
    def _pause_s(self) -> float:
        return LOST_BACKOFF_S[min(self._num_misses, len(LOST_BACKOFF_S)) - 1] if self._num_misses else PERIOD_S

    def _look(self) -> None:
        wanted = self._wanted
        if wanted is not self._followed:
            self._close()
            self._followed, self._num_misses = wanted, 0
        try:
            if self._source is None:
                self._source = open_source(wanted.device, wanted.gpus)
            self._latest = self._source.read()
            self._num_misses, self._is_failing = 0, False
        except GpuLostError as error:
            self._close()
            self._num_misses += 1
            self._lose(wanted, str(error))
        except Exception:  # no figure is worth the requests that run: the last ones age, and the next look tries again
            self._close()
            if not self._is_failing:
                logger.exception("Telemetry cannot be read")
            self._is_failing = True
        if wanted is self._wanted:
            self._answered.set()

    def _lose(self, followed: _Followed, detail: str) -> None:
        last = self._latest
        device = last.device if last is not None and last.source == "nvml" else "GPU"
        self._latest = Telemetry(
            source="nvml", device=device, uuid=followed.gpus[0], lost=True, detail=detail, time_s=self._clock()
        )
        if followed.on_loss is not None and self._num_misses == 1:
            followed.on_loss(detail)

    def _close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
