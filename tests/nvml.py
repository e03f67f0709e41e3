"""An NVML library for tests, built from C, so that NVIDIA's own bindings run on a machine without a GPU."""

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_library.c")
UUID = "GPU-6ba7b810-9dad-11d1-80b4-00c04fd430c8"
SECOND_UUID = "GPU-8ba7b810-9dad-11d1-80b4-00c04fd430c8"
MIG_UUID = "MIG-7ba7b810-9dad-11d1-80b4-00c04fd430c8"
WHOLE: dict[str, object] = {
    "name": "Stand-in A1",
    "uuid": UUID,
    "utilization": 73,
    "memory_total": 80 * 2**30,
    "memory_used": 60 * 2**30,
    "temperature": 64,
    "power_mw": 312_500,
    "power_limit_mw": 400_000,
    "sm_clock": 1410,
    "memory_clock": 1593,
    "throttle": 0x4 | 0x40,
    "ecc_corrected": 7,
    "ecc_uncorrected": 1,
    "processes": "17:1000 0:5000 18:2000",
}
NOT_SUPPORTED_FIELDS = ("power_mw", "ecc_uncorrected", "throttle", "processes")
LOST, TIMEOUT = 15, 10
"""Errors as NVML numbers them."""


def build_library(folder: Path) -> Path:
    """Compile it; the loader takes it for NVIDIA's by its name."""
    library = folder / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["cc", *options, "-o", str(library), str(SOURCE)], check=True)
    return library


class StandIn:
    """What the library says, in a file that it reads at every call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.say(**WHOLE)

    def say(self, **values: object) -> None:
        """From now on this and nothing else, at once."""
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(f"{name} {value}\n" for name, value in values.items()))
        draft.replace(self.path)
