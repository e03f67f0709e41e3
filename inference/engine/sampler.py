"""The next token of every sequence of a step; what is random depends on the sequence's seed and position only."""

import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from inference.engine import draw_device
from inference.engine.adjust import Floats, change_row, change_rows, changes
from inference.engine.draw import draw, is_greedy, uniforms
from scheduling.core.sequence import Sequence, TokenLogprob

logger = logging.getLogger(__name__)

NOT_FINITE = "The model's logits are not finite; this request cannot go on."


class Ask(NamedTuple):
    """A sequence whose next token is wanted, and after it those of a draft while they turn out as guessed."""

    sequence: Sequence
    draft: tuple[int, ...] = ()


class Choice(NamedTuple):
    """A chosen token, or why there is none."""

    token_id: int = -1
    logprob: TokenLogprob | None = None
    error: str | None = None


Chosen = Callable[[], list[list[Choice]]]
"""Waits for the tokens of a step."""


class Sampler:
    """Chooses tokens. Nothing depends on the other sequences of a step, and what fails in one fails in it alone."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: torch.Tensor, asks: Seq[Ask]) -> list[list[Choice]]:
        """Tokens for each ask; logits [N, vocab] have one row per ask and one per token of its draft.

        A draft is a guess at what would be chosen: its tokens stand as long as they are what is chosen at their place,
        so that the text is the one without drafts, for sampled requests too.
        """
        return self.launch(logits, asks)()

    def launch(self, logits: torch.Tensor, asks: Seq[Ask]) -> Chosen:
        """The same, begun: an accelerator is given its work, and the call that is returned waits for the tokens.

        What they depend on is read of the sequences now.
        """
        if logits.device.type == "cpu":
            answers = self._on_host(logits.float().numpy(), asks)
            return lambda: answers
        return partial(self._finish, logits, asks, self._try_launch(logits, asks))

    def _try_launch(self, logits: torch.Tensor, asks: Seq[Ask]) -> Chosen | None:
        try:
            return self._on_device(logits, asks)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception:
            logger.exception("A batch cannot be sampled; its sequences are sampled one by one")
            return None

    def _finish(self, logits: torch.Tensor, asks: Seq[Ask], chosen: Chosen | None) -> list[list[Choice]]:
        try:
            return chosen() if chosen is not None else self._one_by_one(logits, asks)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception:
            logger.exception("A batch cannot be sampled; its sequences are sampled one by one")
            return self._one_by_one(logits, asks)

    def _on_host(self, rows: Floats, asks: Seq[Ask]) -> list[list[Choice]]:
        """Row by row, which keeps each in the processor's cache; only as far as drafts are right."""
        drawn = uniforms_of(asks)
        likeliest = rows.argmax(-1)
        finite = np.isfinite(rows[np.arange(len(rows)), likeliest])
        answers, start = [], 0
        for ask in asks:
            chosen: list[Choice] = []
            for j in range(len(ask.draft) + 1):
                at = start + j
                best = int(likeliest[at])
                if finite[at]:
                    chosen.append(self._choose(rows[at], best, ask.sequence, j, drawn[at]))
                else:
                    chosen.append(Choice(error=NOT_FINITE))
                if j < len(ask.draft) and chosen[j].token_id != ask.draft[j]:
                    break
            answers.append(chosen)
            start += len(ask.draft) + 1
        return answers

    def _choose(self, row: Floats, best: int, sequence: Sequence, offset: int, uniform: float) -> Choice:
        """The token `offset` places after the next one, from its finite logits [vocab]."""
        try:
            return self._choose_token(row, best, sequence, len(sequence.tokens) + offset, uniform)
        except Exception as error:
            return _failed(sequence, error)

    def _choose_token(self, row: Floats, best: int, sequence: Sequence, position: int, uniform: float) -> Choice:
        params, changed = sequence.sampling, row
        for change in changes(sequence, position, self._eos_token_ids):
            if changed is row:
                changed = row.copy()
            change_row(changed, change)
        if changed is not row:
            best = int(changed.argmax())
            if not np.isfinite(changed[best]):
                return Choice(error=NOT_FINITE)
        token_id = best if is_greedy(params) else draw(changed, float(changed[best]), params, uniform)
        if params.logprobs is None:
            return Choice(token_id)
        return Choice(token_id, measure(row, token_id, params.logprobs))

    def _on_device(self, logits: torch.Tensor, asks: Seq[Ask]) -> Chosen:
        """All rows at once: their parameters go there with the step, and what is chosen comes back in one transfer."""
        rows = [(ask.sequence, len(ask.sequence.tokens) + j) for ask in asks for j in range(len(ask.draft) + 1)]
        raw = logits.float()
        changed = change_rows(raw, [tuple(changes(*row, self._eos_token_ids)) for row in rows])
        drawn = draw_device.choose(changed, raw, [s.sampling for s, _ in rows], [at for _, at in rows])

        def wait() -> list[list[Choice]]:
            choices = [Choice(d.token_id, d.logprob) if d.is_finite else Choice(error=NOT_FINITE) for d in drawn()]
            return _accept(choices, asks)

        return wait

    def _one_by_one(self, logits: torch.Tensor, asks: Seq[Ask]) -> list[list[Choice]]:
        answers, start = [], 0
        for ask in asks:
            end = start + len(ask.draft) + 1
            try:
                answers += self._on_device(logits[start:end], [ask])()
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:
                answers.append([_failed(ask.sequence, error)])
            start = end
        return answers


def uniforms_of(asks: Seq[Ask]) -> list[float]:
    """A random number for each row; zeros where none is needed."""
    if all(is_greedy(ask.sequence.sampling) for ask in asks):
        return [0.0] * sum(len(ask.draft) + 1 for ask in asks)
    places = [(ask.sequence, len(ask.sequence.tokens) + j) for ask in asks for j in range(len(ask.draft) + 1)]
    drawn: list[float] = uniforms([s.sampling.seed for s, _ in places], [at for _, at in places]).tolist()
    return drawn


def measure(row: Floats, token_id: int, num_top: int) -> TokenLogprob:
    """Log probabilities by the model itself (vLLM's `raw_logprobs`), of logits [vocab]; the likeliest first."""
    largest = float(row.max())
    norm = largest + math.log(float(np.exp(row - np.float32(largest)).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        count = min(num_top, len(row))
        least = np.partition(row, len(row) - count)[len(row) - count]
        likely = np.flatnonzero(row >= least)
        order = likely[np.argsort(-row[likely], kind="stable")][:count]
        top = tuple((int(i), float(row[i]) - norm) for i in order)
    return TokenLogprob(token_id, float(row[token_id]) - norm, top)


def _accept(choices: list[Choice], asks: Seq[Ask]) -> list[list[Choice]]:
    """Each ask's choices up to the first that its draft did not guess."""
    answers, start = [], 0
    for ask in asks:
        own = choices[start : start + len(ask.draft) + 1]
        right = 0
        while right < len(ask.draft) and own[right].token_id == ask.draft[right]:
            right += 1
        answers.append(own[: right + 1])
        start += len(own)
    return answers


def _failed(sequence: Sequence, error: Exception) -> Choice:
    logger.exception("Request %s failed in the sampler", sequence.id)
    return Choice(error=f"No token could be chosen ({type(error).__name__}).")
