"""The fleet's part of the live document: what operators want beside what runs, and where more could run."""

from dataclasses import asdict

from dashboard.readings import Reading
from dashboard.state import Document, prune
from inference.fleet_view import view_fleet
from inference.plan import SILENT_S, Device, Machine

GRAIN_BYTES = 2**26
"""Free memory is shown in steps of this size: else every update would carry it."""


def fleet_document(reading: Reading) -> Document:
    """`wanted`, `wishes` and `machines` by name. Nothing in it moves by itself, so that updates stay small."""
    view = view_fleet(
        reading.plan, reading.machines, reading.replicas.values(), reading.deployments, now_s=reading.time_s
    )
    return prune(  # type: ignore[no-any-return]
        {
            "wanted": {
                d.model: {"wanted": d.wanted, "running": d.running, "differs": d.differs} for d in view.deployments
            },
            "wishes": {
                replica.name: {name: value for name, value in asdict(replica).items() if name != "name"}
                for replica in view.replicas
            },
            "machines": {machine.name: _machine(machine, reading.time_s) for machine in view.machines},
        }
    )


def _machine(machine: Machine, now_s: float) -> Document:
    silent = now_s - machine.time_s > SILENT_S
    return {
        "host": machine.host,
        "silent_since_s": machine.time_s if silent else None,
        "orchestrated": machine.orchestrated,
        "drain_s": machine.drain_s,
        "devices": [_device(device) for device in machine.devices],
        "replicas": [replica.name for replica in machine.replicas],
    }


def _device(device: Device) -> Document:
    free = device.memory_free_bytes // GRAIN_BYTES * GRAIN_BYTES
    return {"name": device.name, "label": device.label, "total_bytes": device.memory_total_bytes, "free_bytes": free}
