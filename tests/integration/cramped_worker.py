"""An engine process whose device has no memory for steps of more than MOST tokens; run as the engine's command."""

import os

import torch

import inference.worker.__main__ as worker
from inference.engine.batch import StepBatch
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec

MOST = 20


class CrampedRunner(ModelRunner):
    """A real runner, whose forward pass runs out of memory."""

    def __init__(self, spec: DeploymentSpec, device: str = "auto") -> None:
        super().__init__(spec, device)
        forward = self._forward

        def cramped(batch: StepBatch) -> torch.Tensor:
            if len(batch.token_ids) > MOST:
                raise torch.OutOfMemoryError
            return forward(batch)

        self._forward = cramped


if __name__ == "__main__":
    vars(worker)["ModelRunner"] = CrampedRunner
    os._exit(worker.main())
