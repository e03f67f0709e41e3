"""What requests change of their logits before a token is chosen: bias, tokens that may not come yet, penalties."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from inference.engine.transfer import upload
from scheduling.core.sequence import Sequence

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class TokenCounts:
    """Which tokens a sequence has, and how often its output has each; kept up with the sequence token by token.

    `ids` [n] are the different tokens, `counts` [n] their number in the output. Prompt tokens are among them with count
    0 where `with_prompt`.
    """

    def __init__(self, sequence: Sequence, with_prompt: bool) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        if with_prompt:
            for token_id in sequence.tokens[: sequence.num_prompt_tokens]:
                self._place(token_id)
        self._num_read = sequence.num_prompt_tokens

    def follow(self, tokens: Seq[int]) -> None:
        """Count the tokens since the last call."""
        for i in range(self._num_read, len(tokens)):
            place = self._place(tokens[i])
            self._counts[place] += 1
        self._num_read = len(tokens)

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        return self._counts[: len(self._places)]

    def _place(self, token_id: int) -> int:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        return place


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to the logits of some tokens: `add` to them, or weaken them by `factor` as CTRL does."""

    stage: Literal[0, 1, 2]
    """Those of a higher one come after all of a lower one; of one stage, in any order."""
    ids: Ids
    add: Floats | None = None
    factor: float = 1.0


def changes(sequence: Sequence, position: int, eos_token_ids: frozenset[int]) -> Iterator[Change]:
    """What the request asks for, for the token at `position`, in the order in which vLLM's `Sampler` does it.

    Bias and the ban of ending tokens before `min_tokens`; then the repetition penalty (Keskar et al. 2019, section 4.1;
    over prompt and output, as transformers' `RepetitionPenaltyLogitsProcessor`); then frequency and presence penalties
    (OpenAI's API reference, over the output). A sequence without any of these gives nothing.
    """
    sampling = sequence.sampling
    if sampling.logit_bias:
        ids, amounts = zip(*sampling.logit_bias, strict=True)
        yield Change(0, np.array(ids, np.int64), add=np.array(amounts, np.float32))
    if position - sequence.num_prompt_tokens < sampling.min_tokens:
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
        if ends:
            yield Change(0, np.array(sorted(ends), np.int64), add=np.full(len(ends), -np.inf, np.float32))
    if sampling.penalises:
        yield from _penalties(sequence)


def _penalties(sequence: Sequence) -> Iterator[Change]:
    sampling, counts = sequence.sampling, sequence.notes
    if not isinstance(counts, TokenCounts):
        counts = sequence.notes = TokenCounts(sequence, with_prompt=sampling.repetition_penalty != 1)
    counts.follow(sequence.tokens)
    if sampling.repetition_penalty != 1:
        yield Change(1, counts.ids, factor=sampling.repetition_penalty)
    if sampling.frequency_penalty or sampling.presence_penalty:
        amounts = counts.counts * np.float32(-sampling.frequency_penalty)
        amounts -= (counts.counts > 0) * np.float32(sampling.presence_penalty)
        yield Change(2, counts.ids, add=amounts)


def change_row(row: Floats, change: Change) -> None:
    """Apply to logits [vocab] in host memory. Raises IndexError for a token outside the vocabulary."""
    if change.add is not None:
        np.add.at(row, change.ids, change.add)
        return
    chosen = row[change.ids]
    row[change.ids] = np.where(chosen > 0, chosen / np.float32(change.factor), chosen * np.float32(change.factor))


def change_rows(logits: torch.Tensor, of_rows: Seq[Seq[Change]]) -> torch.Tensor:
    """The logits [N, vocab] on any device with each row's changes, in a copy where there are any; in one upload.

    Raises IndexError for a token outside the vocabulary.
    """
    vocab = logits.shape[1]
    stages: list[list[tuple[Ids, Floats]]] = [[], [], []]
    for row, of_row in enumerate(of_rows):
        for change in of_row:
            if ((change.ids < 0) | (change.ids >= vocab)).any():
                raise IndexError(f"A token is outside the vocabulary of {vocab}.")
            factors = np.full(len(change.ids), change.factor, np.float32)
            stages[change.stage].append((change.ids + row * vocab, factors if change.add is None else change.add))
    if not any(stages):
        return logits
    logits = logits.clone()
    arrays = [np.concatenate(part) for stage in stages for part in zip(*stage, strict=True)]
    moved, flat = iter(upload(arrays, logits.device)), logits.view(-1)
    for number, stage in enumerate(stages):
        if not stage:
            continue
        places, amounts = next(moved), next(moved)
        if number == 1:
            chosen = flat[places]
            flat[places] = torch.where(chosen > 0, chosen / amounts, chosen * amounts)
        else:
            flat.index_add_(0, places, amounts)
    return logits
