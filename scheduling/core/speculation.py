"""Guesses what a text goes on with, and stops guessing where verifying costs more than it brings.

Guesses are verified in the step that computes the next token anyway (as in Leviathan et al., ICML 2023, section 2.3):
each place's token is chosen by its own random number, and the draft stands as far as it says the same, so that every
token is the one that would have been chosen without drafts. They come from what the text repeats (prompt lookup
decoding, Saxena 2023; vLLM's `ngram` speculator), or from a small model.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from scheduling.core.blocks import BlockAllocator
from scheduling.core.sequence import PartResult, Sequence, StepPart

LONGEST, SHORTEST = 4, 2
"""Tokens at the end of a text that are looked up, the longest first."""
TRIAL_STEPS = 8
"""Steps in one way of working before the other is tried or judged."""
PATIENCE_STEPS = 256
"""Steps after which the way that pays less is tried again."""
FORGIVEN_STEPS = 4 * TRIAL_STEPS
"""How long a source that begins again may take to read what it has missed, before its steps count."""
KEPT = 0.97
"""What a step leaves of the sums before it, so that they follow the traffic."""


class Ask(NamedTuple):
    """A sequence that decodes, and how many tokens at most are wanted for it; its blocks have room for them."""

    sequence: Sequence
    limit: int


class Drafter(Protocol):
    """Guesses tokens that decodes may find right."""

    num_drafted: int
    """Tokens that were verified, and of these the ones that were right."""
    num_accepted: int
    spent_s: float
    """Seconds that guessing took for the step that is planned."""

    def limit(self, sequence: Sequence) -> int:
        """How many tokens it would guess for a sequence now."""
        ...

    def propose(self, asks: Items[Ask]) -> list[tuple[int, ...]]:
        """For each ask the tokens that may come next, none where it does not know."""
        ...

    def observe(self, parts: Items[StepPart], results: Items[PartResult], seconds: float) -> None:
        """Learn from a step that is about to be applied; `seconds` with the guessing."""
        ...


def add_drafts(
    drafter: Drafter, parts: list[StepPart], spare: int, allocator: BlockAllocator, watermark_blocks: int
) -> int:
    """Put drafts into decodes: as many as fit the budget, `max_tokens`, and blocks that nobody needs; how many."""
    asks, places = [], []
    for i, part in enumerate(parts):
        sequence = part.sequence
        held = len(sequence.block_table) * allocator.block_size - len(sequence.tokens)
        more = max(0, allocator.num_free - watermark_blocks) * allocator.block_size
        left = sequence.max_tokens - sequence.num_output_tokens - 1
        limit = min(spare, left, held + more, drafter.limit(sequence))
        if limit <= 0:
            continue
        if limit > held:
            sequence.block_table += allocator.allocate(allocator.blocks_for(limit - held))
        spare -= limit
        asks.append(Ask(sequence, limit))
        places.append(i)
    drafts = drafter.propose(asks) if asks else []
    for i, draft in zip(places, drafts, strict=True):
        if draft:
            parts[i] = replace(parts[i], num_tokens=1 + len(draft), draft=draft)
    return sum(map(len, drafts))


class Source(Protocol):
    """Where guesses come from."""

    is_level: bool
    """Whether it had read all texts it was asked about last."""
    memory_bytes: int
    """Of the device, for as long as the engine runs."""

    def propose(self, asks: Items[Ask]) -> list[tuple[int, ...]]:
        """See Drafter. What it keeps of a sequence stands in `sequence.lookup`, until the sequence is preempted."""
        ...


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


class NGrams:
    """Guesses from what each text repeats."""

    is_level = True
    memory_bytes = 0

    def propose(self, asks: Items[Ask]) -> list[tuple[int, ...]]:
        """See Source."""
        return [self._index_of(sequence).propose(sequence.tokens, limit) for sequence, limit in asks]

    def _index_of(self, sequence: Sequence) -> NGramIndex:
        if not isinstance(sequence.lookup, NGramIndex):
            sequence.lookup = NGramIndex()
        return sequence.lookup


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

    def __init__(
        self, num_draft_tokens: int, source: Source | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`source`: by default what texts repeat. `clock` in seconds."""
        self._num_draft_tokens = num_draft_tokens
        self._source = source or NGrams()
        self._clock = clock
        self._gates: dict[int, Gate] = {}
        self._gate = self._gate_of(1)
        self._num_behind = 0
        """Steps since guessing began again in which the source has not been level yet."""
        self._was_level = False
        self.num_drafted = 0
        """Tokens that were verified, and of these the ones that were right."""
        self.num_accepted = 0
        self.spent_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether the next step may have drafts."""
        return self._gate.is_open

    def limit(self, sequence: Sequence) -> int:
        """See Drafter. Where a token changes the chances of those after it, none."""
        return self._num_draft_tokens if self._gate.is_open and not sequence.sampling.penalises else 0

    def propose(self, asks: Items[Ask]) -> list[tuple[int, ...]]:
        """See Drafter."""
        started_s = self._clock()
        drafts = self._source.propose(asks)
        self.spent_s = self._clock() - started_s
        self._was_level |= self._source.is_level
        self._num_behind += not self._was_level
        return drafts

    def observe(self, parts: Items[StepPart], results: Items[PartResult], seconds: float) -> None:
        """Learn from a step before it is applied; steps that also read prompts tell nothing of drafts.

        Nor do those in which a source that begins again reads what it has missed.
        """
        self.spent_s = 0.0
        self.num_drafted += sum(len(part.draft) for part in parts)
        self.num_accepted += sum(len(result.more) for result in results)
        tells = not self.is_on or self._was_level or not 0 < self._num_behind < FORGIVEN_STEPS
        if tells and all(part.samples and part.num_tokens == 1 + len(part.draft) for part in parts):
            tokens = sum(1 + len(result.more) for result in results if result.token_id is not None)
            self._gate.observe(tokens, seconds)
        self._gate = self._gate_of(len(parts))
        if not self.is_on:
            self._was_level, self._num_behind = False, 0

    def _gate_of(self, batch_size: int) -> Gate:
        """Batches of about the same size share what is known: what a draft costs depends on it."""
        return self._gates.setdefault(batch_size.bit_length(), Gate())
