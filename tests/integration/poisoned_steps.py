"""An engine process in which certain tokens break the forward pass or the making of text, to be run as its command."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

import inference.worker.__main__ as worker
from inference.engine.batch import StepBatch
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from inference.tokenization import Tokenizer

FORWARD_POISON, TEXT_POISON, NAN_POISON = 319, 318, 317


class PoisonedRunner(ModelRunner):
    """A real runner, whose forward pass refuses one token; another one's logits are not finite."""

    def __init__(self, spec: DeploymentSpec, device: str = "auto") -> None:
        super().__init__(spec, device)
        forward = self._forward

        def poisoned(batch: StepBatch) -> torch.Tensor:
            if FORWARD_POISON in batch.token_ids:
                raise RuntimeError("a kernel refused this token")
            logits = forward(batch)
            logits[torch.from_numpy(batch.token_ids[batch.sample_rows] == NAN_POISON)] = torch.nan
            return logits

        self._forward = poisoned


class PoisonedTokenizer(Tokenizer):
    """A real tokenizer that has no text for one token."""

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        tokenizer = super().load(path)
        tokenizer.__class__ = cls
        return tokenizer

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if TEXT_POISON in ids:
            raise ValueError("no text for this token")
        return super().decode(ids, skip_special_tokens)


if __name__ == "__main__":
    vars(worker).update(ModelRunner=PoisonedRunner, Tokenizer=PoisonedTokenizer)
    os._exit(worker.main())
