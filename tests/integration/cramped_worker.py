"""An engine process whose device has no memory for steps of more than MOST tokens; run as the engine's command.

Nor for any step of a prompt that begins with GREEDY. Where a file is named that is not there yet, it makes that, and
has no memory at all.
"""

import os
import sys
from pathlib import Path

import torch

import inference.worker.__main__ as worker
from inference.engine.batch import StepBatch
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec

MOST = 20
GREEDY = 319


class CrampedRunner(ModelRunner):
    """A real runner, whose forward pass runs out of memory."""

    def __init__(self, spec: DeploymentSpec, device: str = "auto") -> None:
        super().__init__(spec, device)
        forward = self._forward
        most = MOST
        if len(sys.argv) > 1 and not (first := Path(sys.argv[1])).exists():
            first.touch()
            most = 0

        def cramped(batch: StepBatch) -> torch.Tensor:
            if len(batch.token_ids) > most or (GREEDY, 0) in zip(batch.token_ids, batch.positions, strict=True):
                raise torch.OutOfMemoryError
            return forward(batch)

        self._forward = cramped


if __name__ == "__main__":
    vars(worker)["ModelRunner"] = CrampedRunner
    os._exit(worker.main())
