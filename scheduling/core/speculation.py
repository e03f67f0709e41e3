"""Guesses what a text goes on with from what it repeats, and stops guessing where verifying costs more than it brings.

Prompt lookup decoding (Saxena 2023; vLLM's `ngram` speculator): where the last few tokens stood in the text before, the
tokens that followed them there are likely to follow again. They are verified in the step that computes the next token
anyway (as in Leviathan et al., ICML 2023, section 2.3): each place's token is chosen by its own random number, and the
draft stands as far as it says the same, so that every token is the one that would have been chosen without drafts.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

from scheduling.core.sequence import PartResult, Sequence, StepPart

LONGEST, SHORTEST = 4, 2
"""Tokens at the end of a text that are looked up, the longest first."""
TRIAL_STEPS = 8
"""Steps in one way of working before the other is tried or judged."""
PATIENCE_STEPS = 256
"""Steps after which the way that pays less is tried again."""
KEPT = 0.97
"""What a step leaves of the sums before it, so that they follow the traffic."""


class NGramIndex:
    """Where each run of a few tokens stood last in a growing text."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], int] = {}
        self._num_read = 0

    def propose(self, tokens: Items[int], limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that followed the text's end where it stood before; a run that repeats goes on."""
        self._follow(tokens)
        for size in range(LONGEST, SHORTEST - 1, -1):
            at = self._places.get(tuple(tokens[-size:]))
            if at is not None:
                period = len(tokens) - at
                return tuple(tokens[at + i % period] for i in range(limit))
        return ()

    def _follow(self, tokens: Items[int]) -> None:
        """Read up to the last token but one: the end itself is what is looked for."""
        for end in range(self._num_read + 1, len(tokens)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._places[tuple(tokens[end - size : end])] = end
        self._num_read = max(self._num_read, len(tokens) - 1)


@dataclass(slots=True)
class _Yield:
    """Tokens and seconds of recent steps."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens = KEPT * self.tokens + tokens
        self.seconds = KEPT * self.seconds + seconds

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Gate:
    """Whether drafts pay at one size of batch: tries both ways, keeps the faster one, and looks again now and then."""

    def __init__(self) -> None:
        self.is_open = True
        self._yields = {True: _Yield(), False: _Yield()}
        self._num_steps = 0
        """In the present way."""

    def observe(self, tokens: int, seconds: float) -> None:
        """Note a step in the present way, and choose the way of the next one."""
        self._yields[self.is_open].add(tokens, seconds)
        self._num_steps += 1
        if self._num_steps < TRIAL_STEPS:
            return
        other = self._yields[not self.is_open]
        pays_less = other.rate > self._yields[self.is_open].rate
        if pays_less or not other.seconds or self._num_steps >= PATIENCE_STEPS:
            self.is_open = not self.is_open
            self._num_steps = 0


class Speculation:
    """Proposes drafts for the sequences of one engine, and learns from its steps whether they pay."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_draft_tokens = num_draft_tokens
        self._gates: dict[int, Gate] = {}
        self._gate = self._gate_of(1)
        self.num_drafted = 0
        """Tokens that were verified, and of these the ones that were right."""
        self.num_accepted = 0

    @property
    def is_on(self) -> bool:
        """Whether the next step may have drafts."""
        return self._gate.is_open

    def propose(self, sequence: Sequence, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may come next. Where a token changes the chances of those after it, none."""
        if not self._gate.is_open or sequence.sampling.penalises:
            return ()
        if not isinstance(sequence.lookup, NGramIndex):
            sequence.lookup = NGramIndex()
        return sequence.lookup.propose(sequence.tokens, min(limit, self._num_draft_tokens))

    def observe(self, parts: Items[StepPart], results: Items[PartResult], seconds: float) -> None:
        """Learn from a step before it is applied; steps that also read prompts tell nothing of drafts."""
        self.num_drafted += sum(len(part.draft) for part in parts)
        self.num_accepted += sum(len(result.more) for result in results)
        if all(part.samples and part.num_tokens == 1 + len(part.draft) for part in parts):
            tokens = sum(1 + len(result.more) for result in results if result.token_id is not None)
            self._gate.observe(tokens, seconds)
        self._gate = self._gate_of(len(parts))

    def _gate_of(self, batch_size: int) -> Gate:
        """Batches of about the same size share what is known: what a draft costs depends on it."""
        return self._gates.setdefault(batch_size.bit_length(), Gate())
