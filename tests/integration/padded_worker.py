"""An engine process that computes as one on a GPU does, but for graphs and the Triton kernel; run as its command."""

import os
from pathlib import Path

import inference.worker.__main__ as worker
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from tests.integration.test_running_ahead import as_on_cuda


class PaddedRunner(ModelRunner):
    """A real runner, whose decode steps of up to four sequences are filled up to sizes."""

    def __init__(self, spec: DeploymentSpec, device: str = "auto") -> None:
        super().__init__(spec, device, runs_ahead=True)
        as_on_cuda(self, Path(spec.path))


if __name__ == "__main__":
    vars(worker)["ModelRunner"] = PaddedRunner
    os._exit(worker.main())
