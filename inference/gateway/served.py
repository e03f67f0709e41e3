"""The models a web process can admit requests for, kept in step with the directory's deployments."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from inference.checkpoint import inspect_checkpoint
from inference.gateway.errors import ModelNotFound, ModelUnavailable
from inference.messages import DeploymentSpec
from inference.tokenization import Characters, TextStream, Tokenizer
from scheduling.core.sequence import SamplingParams
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys

log = logging.getLogger(__name__)
ANY = 2**31 - 1
"""Vocabulary of an upstream server's model, which its server knows: nothing is refused here."""
LONGEST = 2**20
"""Context length of such a model where none is set. What waits is counted by the tokens that it asks for: without a
bound one request could claim so many that others are refused by the wait they seem to mean."""
RETRY_S = 30.0
"""How often a model whose files could not be read is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A deployment with what admission needs of it."""

    spec: DeploymentSpec
    tokenizer: Tokenizer | None
    """None for an upstream server's model whose tokenizer is not at hand; every other has one."""
    vocab_size: int
    max_model_len: int
    """Prompt and completion together, in tokens."""
    queue: FleetQueue

    @property
    def name(self) -> str:
        """The name clients ask for."""
        return self.spec.name

    def texts(self, sampling: SamplingParams, journal: Sequence[int]) -> list[str]:
        """The text that belongs to each entry of a request's journal, as its worker sent it."""
        if self.spec.is_upstream:
            stream: TextStream | Characters = Characters()
        else:
            assert self.tokenizer is not None
            stream = TextStream.of(self.tokenizer, sampling)
        return [stream.push(entry) for entry in journal]

    def text(self, journal: Sequence[int]) -> str:
        """The text of a journal so far."""
        if self.spec.is_upstream:
            return "".join(map(Characters().push, journal))
        assert self.tokenizer is not None
        return self.tokenizer.decode(journal)


class ServedModels:
    """Loads tokenizers in a thread when deployments come or change."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._served: dict[str, ServedModel] = {}
        self._failed: dict[str, DeploymentSpec] = {}
        self._next_try_s = 0.0
        self.specs: Mapping[str, DeploymentSpec] = {}
        """All deployments, those that could not be loaded included."""

    def find(self, name: str) -> ServedModel:
        """The model of that name. Raises ModelNotFound, or ModelUnavailable where its files cannot be read."""
        model = self._served.get(name)
        if model is not None:
            return model
        if name in self.specs:
            raise ModelUnavailable(f"The model '{name}' cannot be loaded at the moment.", param="model")
        raise ModelNotFound(f"The model '{name}' does not exist.", param="model")

    def loaded(self) -> list[ServedModel]:
        """Every model that can be asked for."""
        return list(self._served.values())

    def is_stale(self, specs: Mapping[str, DeploymentSpec]) -> bool:
        """Whether the directory's deployments are others, or a model that could not be loaded should be tried again."""
        return specs is not self.specs or (bool(self._failed) and time.monotonic() >= self._next_try_s)

    async def refresh(self, specs: Mapping[str, DeploymentSpec]) -> None:
        """Take over the directory's deployments; a model whose files cannot be read is left out with a log line."""
        if time.monotonic() >= self._next_try_s:
            self._failed.clear()
            self._next_try_s = time.monotonic() + RETRY_S
        self.specs = specs
        for name in self._served.keys() - specs.keys():
            del self._served[name]
        for name, spec in specs.items():
            served = self._served.get(name)
            if (served is None or served.spec != spec) and self._failed.get(name) != spec:
                await self._load(spec)

    async def _load(self, spec: DeploymentSpec) -> None:
        try:
            model = await asyncio.to_thread(load_model, spec, self._keys)
        except Exception as error:
            self._failed[spec.name] = spec
            self._served.pop(spec.name, None)
            log.warning("Model %s cannot be served: %s", spec.name, error)
        else:
            self._failed.pop(spec.name, None)
            self._served[spec.name] = model


def load_model(spec: DeploymentSpec, keys: Keys) -> ServedModel:
    """Read tokenizer and context length of a checkpoint; of an upstream server's model what there is of them."""
    if spec.is_upstream:
        return ServedModel(
            spec=spec,
            tokenizer=Tokenizer.load(Path(spec.path)) if spec.path else None,
            vocab_size=ANY,
            max_model_len=spec.max_model_len or LONGEST,
            queue=FleetQueue(keys, spec.name),
        )
    path = Path(spec.path)
    info = inspect_checkpoint(path)
    limit = min(spec.max_model_len or info.max_model_len, info.max_model_len)
    return ServedModel(
        spec=spec,
        tokenizer=Tokenizer.load(path),
        vocab_size=info.vocab_size,
        max_model_len=limit,
        queue=FleetQueue(keys, spec.name),
    )
