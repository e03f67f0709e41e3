"""A small model that guesses what the large one says next; both keep keys and values in blocks of one numbering."""

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import msgspec

from inference.checkpoint import inspect_checkpoint
from inference.engine.errors import ModelLoadError, OutOfDeviceMemory
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from scheduling.core.sequence import PartResult, Sequence, StepPart
from scheduling.core.speculation import Ask

logger = logging.getLogger(__name__)

LAG = 2
"""Tokens that it lacks after a step in which all guesses were right: the last of them, and the token after it."""
READ_TOKENS = 256
"""Of texts that it has not read yet, as many at a time, so that no stream waits long for its reading."""


@dataclass(slots=True)
class Shadow:
    """A sequence as the draft model has it: the request's own tokens and blocks, and its guesses behind them."""

    sequence: Sequence
    num_own: int
    """Tokens that are the request's own."""
    failed: bool = False

    @classmethod
    def of(cls, sequence: Sequence) -> "Shadow":
        """Of a sequence that it has read nothing of. Log probabilities of guesses are wanted by nobody."""
        copy = replace(
            sequence, tokens=list(sequence.tokens), sampling=replace(sequence.sampling, logprobs=None),
            block_table=sequence.block_table, num_computed=0, notes=None, lookup=None, block_hashes=[], host_table=[],
        )  # fmt: skip
        return cls(copy, len(copy.tokens))

    def follow(self, tokens: list[int]) -> None:
        """Take over what the request has got; guesses that were right stay computed."""
        mine = self.sequence.tokens
        pairs = zip(mine[self.num_own :], tokens[self.num_own :], strict=False)
        right = self.num_own + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        mine[right:] = tokens[right:]
        self.sequence.num_computed = min(self.sequence.num_computed, right, len(tokens) - 1)
        self.num_own = len(tokens)

    @property
    def guesses(self) -> tuple[int, ...]:
        """What it says comes next."""
        return tuple(self.sequence.tokens[self.num_own :])

    def note(self, part: StepPart, result: PartResult) -> None:
        """Take what a step of the draft model gave."""
        self.failed = result.error is not None
        if not self.failed:
            self.sequence.num_computed += part.num_tokens
            if result.token_id is not None:
                self.sequence.tokens.append(result.token_id)


class DraftModel:
    """A source of guesses for `Speculation`. It chooses as the request asks, with the request's own random numbers.

    So a model that thinks like the large one chooses like it, for sampled requests, too; verifying makes sure that the
    text is the same whatever it guesses. It reads each text by itself, from its first token: what others left in
    shared blocks is written again, with the same content.
    """

    def __init__(self, runner: ModelRunner, weight_bytes: int = 0) -> None:
        """`runner` has as many blocks as the large model's, and its vocabulary."""
        self.is_level = True
        self.memory_bytes = weight_bytes + runner.num_blocks * runner.block_bytes
        self._runner = runner

    def describe(self) -> str:
        """What was chosen at load, and why."""
        return f"Guesses come from {self._runner.describe()}"

    def propose(self, asks: Items[Ask]) -> list[tuple[int, ...]]:
        """Guesses for each ask, all sequences in one batch: what was not read yet, then token by token."""
        shadows = [self._shadow_of(sequence) for sequence, _ in asks]
        limits = [
            0 if shadow.failed or shadow.num_own + limit > self._runner.max_model_len else limit
            for shadow, (_, limit) in zip(shadows, asks, strict=True)
        ]
        try:
            self._read([shadow for shadow, limit in zip(shadows, limits, strict=True) if limit])
            for count in range(1, max(limits, default=0)):
                self._step([s for s, limit in zip(shadows, limits, strict=True) if count < limit and s.guesses])
        except OutOfDeviceMemory:
            logger.warning("The device has no memory for a step of the draft model; there are no guesses.")
        return [shadow.guesses[:limit] for shadow, limit in zip(shadows, limits, strict=True)]

    def _shadow_of(self, sequence: Sequence) -> Shadow:
        if not isinstance(sequence.lookup, Shadow):
            sequence.lookup = Shadow.of(sequence)
        sequence.lookup.follow(sequence.tokens)
        return sequence.lookup

    def _read(self, shadows: list[Shadow]) -> None:
        """Compute what is missing of each text, of long ones a part; who is level then has a first guess."""
        left, readers, parts = READ_TOKENS, [], []
        for shadow in shadows:
            sequence = shadow.sequence
            missing = len(sequence.tokens) - sequence.num_computed
            count = missing if missing <= LAG else min(missing, left)
            if count:
                left -= count if missing > LAG else 0
                readers.append(shadow)
                parts.append(StepPart(sequence, count, samples=count == missing))
        self.is_level = len(readers) == len(shadows) and all(part.samples for part in parts)
        self._run(readers, parts)

    def _step(self, shadows: list[Shadow]) -> None:
        """One more guess for each."""
        self._run(shadows, [StepPart(shadow.sequence, 1, samples=True) for shadow in shadows])

    def _run(self, shadows: list[Shadow], parts: list[StepPart]) -> None:
        for shadow, part, result in zip(shadows, parts, self._runner.step(parts), strict=True):
            shadow.note(part, result)


def draft_spec(spec: DeploymentSpec) -> DeploymentSpec:
    """How a deployment's draft model is loaded: as the large one, but for what belongs to that alone."""
    return msgspec.structs.replace(spec, path=spec.draft_path, max_model_len=0, quantization="none", speculation="off")


def load_draft(spec: DeploymentSpec, runner: ModelRunner) -> DraftModel | None:
    """The draft model that a deployment names, beside its large model; None where it names none.

    Raises ModelLoadError or CheckpointError with a sentence that says what to do.
    """
    if spec.speculation != "model":
        return None
    draft = ModelRunner(draft_spec(spec), str(runner.device), num_blocks=runner.num_blocks, num_host_blocks=0)
    if draft.vocab_size != runner.vocab_size:
        raise ModelLoadError(
            f"The draft model has a vocabulary of {draft.vocab_size} tokens, the model itself one of "
            f"{runner.vocab_size}. Give a smaller model of the same family."
        )
    info = inspect_checkpoint(Path(spec.draft_path), needs_tokenizer=False)
    return DraftModel(draft, info.num_parameters * draft.dtype.itemsize)
