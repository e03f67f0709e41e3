"""A machine's supervisor whose gpu workers load no model: `python -m tests.integration.light_machine`.

Where it is told of a stand-in for NVML, its torch is taken for one that knows CUDA.
"""

import asyncio
import os
import signal
import sys
import threading
from importlib import metadata

from controlplane.child import die_with_parent
from controlplane.config import Config, load_config
from controlplane.machine import keep_machine
from controlplane.processes import ProcessSpec
from controlplane.supervisor import Supervisor
from inference.reconcile import Wanted


def light_process(config: Config, wanted: Wanted) -> ProcessSpec:
    """A worker that ends when it is told to; one of the model `broken` ends at once, a `stubborn` one never."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else "", wanted.model, str(os.getpid())]
    return ProcessSpec(name=wanted.name, command=command)


def work(model: str, parent: int) -> None:
    """Be such a worker."""
    die_with_parent(signal.SIGKILL, parent)
    if model == "broken":
        sys.exit(3)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if model == "stubborn" else told.set())
    while not told.wait(0.05):
        pass


async def main() -> None:
    """Supervise until told to stop."""
    if "NVML_STAND_IN" in os.environ:
        vars(metadata)["version"] = lambda name: "2.9.0+cu130"
    supervisor = Supervisor(sys.stdout)
    await supervisor.open()
    try:
        async with keep_machine(load_config(), supervisor, make_process=light_process):
            await supervisor.wait()
    finally:
        await supervisor.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], int(sys.argv[2]))
    else:
        asyncio.run(main())
