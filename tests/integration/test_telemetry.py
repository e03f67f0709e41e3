"""GPU telemetry through NVIDIA's own bindings, on a stand-in for its library that is built here from C."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
from msgspec.structs import replace

from inference.messages import BatchEvent, Telemetry
from inference.models import BatchRecord
from inference.records import make_row
from inference.worker.nvml import GpuLostError, NvmlSource
from inference.worker.telemetry import STALE_S, HostSource, TelemetryReader, open_source
from tests.nvml import LOST, MIG_UUID, NOT_SUPPORTED_FIELDS, TIMEOUT, UUID, WHOLE, StandIn, build_library
from tests.patience import PATIENCE_S, wait_until


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loaded first, it is what the bindings find under NVIDIA's name."""
    ctypes.CDLL(str(build_library(tmp_path_factory.mktemp("nvml"))))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(tmp_path / "nvml")
    monkeypatch.setenv("NVML_STAND_IN", str(stand_in.path))
    return stand_in


@pytest.fixture
def reader(gpu: StandIn) -> Iterator[TelemetryReader]:
    reader = TelemetryReader()
    reader.start()
    yield reader
    gpu.say(**WHOLE)
    reader.follow("cpu", ())
    assert reader.first(PATIENCE_S) is not None


def test_every_figure_of_a_gpu_is_read(gpu: StandIn) -> None:
    telemetry = NvmlSource((UUID,)).read()
    assert (telemetry.source, telemetry.device, telemetry.uuid, telemetry.mig) == ("nvml", "Stand-in A1", UUID, "")
    assert (telemetry.utilization_percent, telemetry.temperature_c) == (73.0, 64)
    assert (telemetry.memory_used_bytes, telemetry.memory_total_bytes) == (60 * 2**30, 80 * 2**30)
    assert (telemetry.power_w, telemetry.power_limit_w) == (312.5, 400.0)
    assert (telemetry.sm_clock_mhz, telemetry.memory_clock_mhz) == (1410, 1593)
    assert telemetry.throttle_reasons == ["power cap", "thermal (hardware)"]
    assert (telemetry.ecc_corrected, telemetry.ecc_uncorrected) == (7, 1)
    assert [process.bytes for process in telemetry.processes] == [5000, 2000, 1000]
    assert (telemetry.processes[0].pid, telemetry.process_memory_bytes) == (os.getpid(), 5000)


def test_what_a_gpu_does_not_support_is_left_out_and_the_rest_stays(gpu: StandIn) -> None:
    gpu.say(**{name: value for name, value in WHOLE.items() if name not in NOT_SUPPORTED_FIELDS})
    telemetry = NvmlSource((UUID,)).read()
    assert telemetry.power_w is None
    assert telemetry.ecc_uncorrected is None
    assert telemetry.process_memory_bytes is None
    assert (telemetry.throttle_reasons, telemetry.processes) == ([], [])
    assert telemetry.temperature_c == 64


def test_a_mig_instance_has_its_own_memory_and_the_power_of_the_whole_gpu(gpu: StandIn) -> None:
    gpu.say(**WHOLE, mig_uuid=MIG_UUID, instance=3, compute=0, mig_memory_total=10 * 2**30, mig_memory_used=2**30)
    telemetry = open_source("cuda", (MIG_UUID.replace("MIG", "GPU"), MIG_UUID)).read()
    assert (telemetry.uuid, telemetry.mig) == (MIG_UUID, "instance 3, compute 0")
    assert (telemetry.memory_used_bytes, telemetry.memory_total_bytes) == (2**30, 10 * 2**30)
    assert telemetry.utilization_percent is None
    assert (telemetry.power_w, telemetry.ecc_corrected, telemetry.temperature_c) == (312.5, 7, 64)


def test_a_gpu_that_is_lost_is_no_missing_field(gpu: StandIn) -> None:
    source = NvmlSource((UUID,))
    gpu.say(**WHOLE, error=LOST)
    with pytest.raises(GpuLostError, match="is lost"):
        source.read()
    with pytest.raises(GpuLostError, match=UUID):
        NvmlSource((UUID,))
    gpu.say(**WHOLE, error=TIMEOUT)
    assert source.read().temperature_c is None


def test_a_gpu_that_was_named_and_is_not_there_counts_as_lost(gpu: StandIn) -> None:
    for name in ("GPU-00000000-0000-0000-0000-000000000000", "7"):
        with pytest.raises(GpuLostError):
            open_source("cuda", (name,))


def test_without_nvml_the_host_is_shown_and_says_why(gpu: StandIn) -> None:
    gpu.say(init_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    source = open_source("cuda", (UUID,))
    assert isinstance(source, HostSource)
    assert source.read().detail.startswith("No NVML telemetry: ")
    assert isinstance(open_source("cpu", ()), HostSource)


def test_a_call_that_hangs_makes_the_reading_stale_and_holds_up_nobody(gpu: StandIn, reader: TelemetryReader) -> None:
    reader.follow("cuda", (UUID,))
    first = reader.first(PATIENCE_S)
    assert first is not None
    assert (first.source, first.stale_s) == ("nvml", 0.0)
    gpu.say(**WHOLE, hang=1)
    wait_until(lambda: (reader.read() or first).stale_s > STALE_S)
    stale = reader.read()  # the call hangs until it is told otherwise, below
    assert stale is not None
    assert stale.temperature_c == 64
    gpu.say(**WHOLE | {"temperature": 41})
    wait_until(lambda: (now := reader.read()) is not None and now.stale_s == 0 and now.temperature_c == 41)


def test_a_driver_that_hangs_from_the_start_is_not_awaited(gpu: StandIn, reader: TelemetryReader) -> None:
    gpu.say(**WHOLE, hang=1)
    reader.follow("cuda", (UUID,))
    assert reader.first(0.1) is None


def test_a_lost_gpu_is_told_once_and_found_again_when_it_returns(gpu: StandIn, reader: TelemetryReader) -> None:
    told: list[str] = []
    reader.follow("cuda", (UUID,), told.append)
    assert reader.first(PATIENCE_S) is not None
    gpu.say(**WHOLE, error=LOST)
    wait_until(lambda: (now := reader.read()) is not None and now.lost and now.device == "Stand-in A1")
    gpu.say(**WHOLE)
    wait_until(lambda: (now := reader.read()) is not None and not now.lost and now.temperature_c == 64)
    assert len(told) == 1
    assert "lost" in told[0]


class _Defective:
    """A source with a defect."""

    def read(self) -> Telemetry:
        raise LookupError

    def close(self) -> None:
        """There is nothing to let go."""


def test_a_defect_of_a_source_ends_neither_the_reader_nor_the_process(caplog: pytest.LogCaptureFixture) -> None:
    reader = TelemetryReader()
    reader._look()
    before = reader.read()
    assert before is not None
    for _ in range(3):
        reader._source = _Defective()
        reader._look()
    assert caplog.text.count("Telemetry cannot be read") == 1
    reader._look()
    after = reader.read()
    assert after is not None
    assert after.time_s > before.time_s


def test_history_keeps_the_new_figures_and_none_that_are_stale() -> None:
    telemetry = Telemetry(
        source="nvml", device="d", sm_clock_mhz=1410, ecc_uncorrected=1, process_memory_bytes=5000, power_limit_w=400.0
    )
    event = BatchEvent(
        replica="gpu-0", model="m", second_s=1, steps=1, batch_size_mean=1, batch_size_max=1, prompt_tokens=0,
        output_tokens=1, step_ms_mean=1, step_ms_max=1, kv_blocks_used=0, kv_blocks_total=1, preemptions=0,
        mode="continuous", policy="fifo", policy_revision=0, telemetry=telemetry,
    )  # fmt: skip
    row = make_row(event)
    assert isinstance(row, BatchRecord)
    assert (row.sm_clock_mhz, row.ecc_uncorrected, row.process_memory_bytes, row.power_limit_w) == (1410, 1, 5000, 400)
    for gone in (replace(telemetry, stale_s=4.0), replace(telemetry, lost=True)):
        row = make_row(replace(event, telemetry=gone))
        assert isinstance(row, BatchRecord)
        assert (row.telemetry_source, row.sm_clock_mhz) == ("nvml", None)
