"""The live page says where its figures of a device are from, when they are old, and when the device is lost."""

import re

import pytest
from msgspec.structs import replace
from playwright.sync_api import expect

from inference.messages import Telemetry
from tests.acceptance.dashboard_web import Visit
from tests.fleet_data import FleetWriter

pytestmark = pytest.mark.acceptance
READ = Telemetry(
    source="nvml", device="Stand-in A1", mig="instance 3, compute 0", utilization_percent=73.0, power_w=312.0,
    power_limit_w=400.0, sm_clock_mhz=1410.0, ecc_uncorrected=2, throttle_reasons=["power cap"],
)  # fmt: skip


def test_a_worker_shows_its_gpu_a_silent_driver_and_a_lost_device(visit: Visit, fleet: FleetWriter) -> None:
    page = visit()
    status = replace(fleet.status("gpu-nvml"), telemetry=READ, steps=200, draft_tokens=600, accepted_tokens=450)
    fleet.publish(status)
    worker = page.locator(".worker", has_text="gpu-nvml")
    expect(worker).to_contain_text("Stand-in A1, instance 3, compute 0")
    expect(worker).to_contain_text("312 of 400 W")
    expect(worker).to_contain_text("75 % right, 2.3 accepted a step")
    expect(worker).to_contain_text(re.compile(r"1,410 MHz.*memory errors\s*2", re.DOTALL))
    fleet.publish(replace(status, telemetry=replace(READ, stale_s=42.0)))
    expect(worker).to_contain_text("42 s ago: the driver does not answer")
    lost = replace(READ, lost=True, detail="GPU is lost.")
    fleet.publish(replace(status, state="failed", detail="GPU is lost.", telemetry=lost))
    expect(worker).to_contain_text(re.compile(r"device\s*lost"))
    expect(worker).to_contain_text("GPU is lost.")
    fleet.publish(replace(status, state="stopped"), ttl_s=1.5)
    expect(worker).to_have_count(0)
