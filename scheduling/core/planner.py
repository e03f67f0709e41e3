"""Plans the engine one step at a time: who decodes, which prefill chunks join, who is admitted, whom to preempt.

Iteration-level batching as in Orca (Yu et al., OSDI 2022, section 3.1), chunked prefill beside decodes as in
Sarathi-Serve (Agrawal et al., OSDI 2024, section 4), and preemption by recompute as in vLLM (Kwon et al., SOSP 2023,
section 4.5).
"""

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from scheduling.core.blocks import BlockAllocator
from scheduling.core.sequence import PartResult, Sequence, StepPart, TokenLogprob

Mode = Literal["serial", "static", "dynamic", "continuous"]
DYNAMIC_WAIT_S = 0.05
"""How long `dynamic` lets the oldest request wait for its batch to fill."""
MIN_STEP_TOKENS = 16
"""`shrink` goes no lower."""


class RequestTooLongError(Exception):
    """Prompt and `max_tokens` together are longer than the model's context or the KV cache."""


class Room(NamedTuple):
    """What may be claimed now: so many requests, whose prompts together have at most `tokens` tokens."""

    requests: int
    tokens: int


class Drafter(Protocol):
    """Guesses tokens that a decode may find right."""

    def propose(self, sequence: Sequence, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens that may come next."""
        ...


class StepOutput(NamedTuple):
    """A token that a step gave a sequence, or its end. One with `finish` or `error` has left the planner.

    `finish` is `stop` after an end-of-sequence token and `length` after `max_tokens`; stop strings are not seen here.
    """

    sequence: Sequence
    token_id: int | None
    finish: Literal["stop", "length"] | None = None
    error: str | None = None
    logprob: TokenLogprob | None = None


@dataclass(slots=True, eq=False)
class _Entry:
    """A sequence in the planner's care."""

    sequence: Sequence
    order: int
    """Its place among the waiting: the order of `add`, which is the policy's. A preempted one keeps it."""
    added_s: float
    right: tuple[int, float, int]
    """Least first. Who stands last gives up its blocks first."""
    running: bool = False


def _by_order(entry: _Entry) -> int:
    return entry.order


def _by_right(entry: _Entry) -> tuple[int, float, int]:
    return entry.right


def _is_ending(sequence: Sequence) -> bool:
    """Whether the next step gives the last token that `max_tokens` allows."""
    return (
        sequence.num_prompt_tokens + sequence.max_tokens - len(sequence.tokens) == 1
        and len(sequence.tokens) - sequence.num_computed == 1
    )


class StepPlanner:
    """The batch of one engine: sequences that wait for admission, in order, and those that run, by their right.

    A running sequence holds KV blocks for all tokens it has; decoding takes one more block at a time. A step computes
    at most `step_tokens` tokens. `clock` and `now` are seconds of the same clock.
    """

    def __init__(
        self,
        mode: Mode,
        max_batch_size: int,
        step_tokens: int,
        allocator: BlockAllocator,
        max_model_len: int,
        clock: Callable[[], float],
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        watermark: float = 0.01,
        drafter: Drafter | None = None,
    ) -> None:
        self.mode = mode
        self.step_tokens = step_tokens
        self.allocator = allocator
        self.max_model_len = min(max_model_len, allocator.num_blocks * allocator.block_size)
        self.num_preemptions = 0
        self.set_batch_size(max_batch_size)
        self._clock = clock
        self._eos_token_ids = eos_token_ids
        self._drafter = drafter
        self._watermark_blocks = max(1, int(allocator.num_blocks * watermark))
        self._budget = step_tokens
        self._num_added = 0
        self._entries: dict[str, _Entry] = {}
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []

    def add(self, sequence: Sequence) -> None:
        """Take a claimed sequence. Raises RequestTooLongError where it could never end."""
        num_tokens = sequence.num_prompt_tokens + sequence.max_tokens
        if num_tokens > self.max_model_len:
            raise RequestTooLongError(
                f"The prompt has {sequence.num_prompt_tokens} tokens and max_tokens is {sequence.max_tokens}; "
                f"together at most {self.max_model_len} fit."
            )
        assert sequence.id not in self._entries, f"{sequence.id} is here already"
        self._num_added += 1
        right = (sequence.priority, sequence.arrival_s, self._num_added)
        entry = _Entry(sequence, self._num_added, self._clock(), right)
        self._entries[sequence.id] = entry
        self._waiting.append(entry)

    def plan(self, now: float) -> list[StepPart]:
        """The parts of the next step: decodes first, then prefill chunks of what runs and of what is admitted now.

        Where a decode lacks a block, the running sequence of least right gives up all of its own, to be computed again.
        """
        parts: list[StepPart] = []
        budget = self._plan_decodes(parts, self._budget)
        self._admit(now)
        self._plan_prefills(parts, budget)
        return parts

    def apply(self, parts: Items[StepPart], results: Items[PartResult]) -> list[StepOutput]:
        """Record what a step computed; returns each token that a sequence got, and which ended or failed."""
        outputs: list[StepOutput] = []
        for part, result in zip(parts, results, strict=True):
            sequence = part.sequence
            if result.error is not None:
                self.remove(sequence)
                outputs.append(StepOutput(sequence, None, error=result.error))
                continue
            sequence.num_computed += part.num_tokens - len(part.draft) + len(result.more)
            if result.token_id is not None:
                self._append(sequence, (result.token_id, *result.more), result.logprobs, outputs)
        if self._budget < self.step_tokens:
            self._budget = min(self.step_tokens, self._budget + 1 + self._budget // 8)
        return outputs

    def _append(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        outputs: list[StepOutput],
    ) -> None:
        """Give a sequence its new tokens, up to one that ends it."""
        for i, token_id in enumerate(token_ids):
            sequence.tokens.append(token_id)
            finish = self.finish_reason(sequence)
            outputs.append(StepOutput(sequence, token_id, finish, logprob=logprobs[i] if logprobs else None))
            if finish is not None:
                self.remove(sequence)
                return

    def finish_reason(self, sequence: Sequence) -> Literal["stop", "length"] | None:
        """Why a sequence is over, judged by its last token; None while it is not."""
        if not sequence.num_output_tokens:
            return None
        last, sampling = sequence.tokens[-1], sequence.sampling
        if (last in self._eos_token_ids and not sampling.ignore_eos) or last in sampling.stop_token_ids:
            return "stop"
        return "length" if sequence.num_output_tokens >= sequence.max_tokens else None

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks; one that is not here is ignored."""
        entry = self._entries.pop(sequence.id, None)
        if entry is not None:
            (self._running if entry.running else self._waiting).remove(entry)
            self.allocator.free(sequence.block_table)

    def clear(self) -> list[Sequence]:
        """Forget every sequence; returns them."""
        sequences = self.sequences
        for sequence in sequences:
            self.remove(sequence)
        return sequences

    def shrink(self) -> bool:
        """After the device ran out of memory: halve the step's budget and preempt the sequence of least right.

        The budget grows back over the following steps, and until then nobody joins. False where nothing is left to
        shrink: then the sequence that runs alone does not fit.
        """
        least = min(MIN_STEP_TOKENS, self.step_tokens)
        shrunk = self._budget > least or len(self._running) > 1
        self._budget = max(least, self._budget // 2)
        if len(self._running) > 1:
            self._preempt(self._running[-1])
        return shrunk

    def room(self) -> Room:
        """What may be claimed now, to run in the next step or the one after it.

        A sequence whose next token is surely its last makes room already: what is claimed during that step takes its
        place without a gap. An idle planner has room for its whole KV cache.
        """
        ending = [entry.sequence for entry in self._running if _is_ending(entry.sequence)]
        requests = self.max_batch_size - len(self._waiting) - len(self._running) + len(ending)
        if requests <= 0 or self._is_closed:
            return Room(0, 0)
        free = self.allocator.num_free + sum(len(sequence.block_table) for sequence in ending)
        if self._entries:
            free -= self._watermark_blocks + sum(
                self.allocator.blocks_for(len(entry.sequence.tokens)) for entry in self._waiting
            )
        return Room(requests, max(0, free) * self.allocator.block_size)

    def due_s(self, now: float) -> float | None:
        """Seconds until `plan` has something to run; None where nothing is here."""
        if not self._entries:
            return None
        if self._running or self._may_form(now):
            return 0.0
        return max(0.0, self._oldest_s() + DYNAMIC_WAIT_S - now)

    def set_mode(self, mode: Mode) -> None:
        """From the next plan on; what runs goes on."""
        self.mode = mode
        self.set_batch_size(self._batch_size)

    def set_batch_size(self, max_batch_size: int) -> None:
        """From the next plan on; where more run already, they go on and none joins them. Raises ValueError below 1."""
        if max_batch_size < 1:
            raise ValueError(f"A batch holds at least one sequence, not {max_batch_size}.")
        self._batch_size = max_batch_size
        self.max_batch_size = 1 if self.mode == "serial" else min(max_batch_size, self.step_tokens)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences here: the running ones by their right, then the waiting ones in order."""
        return [entry.sequence for entry in (*self._running, *self._waiting)]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_integrity(self) -> None:
        """Assert that blocks, lists and index agree."""
        self.allocator.check_integrity([sequence.block_table for sequence in self.sequences])
        assert len(self._entries) == len(self._waiting) + len(self._running)
        assert self._running == sorted(self._running, key=_by_right)
        assert self._waiting == sorted(self._waiting, key=_by_order)
        assert all(entry.running for entry in self._running)
        assert not any(entry.running for entry in self._waiting)
        for entry in self._running:
            held = len(entry.sequence.block_table) * self.allocator.block_size
            assert entry.sequence.num_computed <= min(held, len(entry.sequence.tokens))

    def _plan_decodes(self, parts: list[StepPart], budget: int) -> int:
        """One token of each sequence whose other tokens are all computed, and drafts; returns the budget left.

        Goes by right, so that a sequence that loses its blocks here was not planned yet.
        """
        running = tuple(self._running)
        for i, entry in enumerate(running):
            sequence = entry.sequence
            if budget == 0:
                break
            if entry.running and sequence.num_computed == len(sequence.tokens) - 1 and self._grow(entry):
                draft = self._draft(sequence, budget - (len(running) - i)) if self._drafter else ()
                parts.append(StepPart(sequence, 1 + len(draft), samples=True, draft=draft))
                budget -= 1 + len(draft)
        return budget

    def _draft(self, sequence: Sequence, spare: int) -> tuple[int, ...]:
        """Tokens to verify beside a decode: as many as fit the budget, `max_tokens`, and blocks that nobody needs."""
        assert self._drafter is not None
        allocator = self.allocator
        held = len(sequence.block_table) * allocator.block_size - len(sequence.tokens)
        more_blocks = max(0, allocator.num_free - self._watermark_blocks)
        left = sequence.max_tokens - sequence.num_output_tokens - 1
        limit = min(spare, left, held + more_blocks * allocator.block_size)
        draft = self._drafter.propose(sequence, limit) if limit > 0 else ()
        if len(draft) > held:
            sequence.block_table += allocator.allocate(allocator.blocks_for(len(draft) - held))
        return draft

    def _grow(self, entry: _Entry) -> bool:
        """Give a running sequence the block for its last token; False where it had to give up its own instead."""
        sequence, allocator = entry.sequence, self.allocator
        if len(sequence.block_table) * allocator.block_size >= len(sequence.tokens):
            return True
        while not allocator.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is entry:
                return False
        sequence.block_table += allocator.allocate(1)
        return True

    def _preempt(self, victim: _Entry) -> None:
        """Take a running sequence's blocks; it waits at its old place, and all its tokens are computed again."""
        self._running.remove(victim)
        self.allocator.free(victim.sequence.block_table)
        victim.sequence.num_computed = 0
        victim.running = False
        insort(self._waiting, victim, key=_by_order)
        self.num_preemptions += 1

    def _admit(self, now: float) -> None:
        """Let waiting sequences into the batch, strictly in order, while slots and blocks for all their tokens last.

        Above the watermark only, so that what runs can grow; but whoever would run alone always gets in.
        """
        if not self._waiting or not self._may_form(now):
            return
        while self._waiting and len(self._running) < self.max_batch_size:
            entry = self._waiting[0]
            needed = self.allocator.blocks_for(len(entry.sequence.tokens))
            if self._running and not self.allocator.can_allocate(needed + self._watermark_blocks):
                return
            entry.sequence.block_table += self.allocator.allocate(needed)
            entry.running = True
            self._waiting.pop(0)
            insort(self._running, entry, key=_by_right)

    def _may_form(self, now: float) -> bool:
        """Whether sequences may be admitted: to an open batch at any step, to a new one when it is due."""
        if self._running:
            return not self._is_closed
        full = len(self._waiting) >= self.max_batch_size
        return self.mode != "dynamic" or full or now - self._oldest_s() >= DYNAMIC_WAIT_S

    @property
    def _is_closed(self) -> bool:
        """Whether what runs takes nobody in."""
        return bool(self._running) and (self.mode != "continuous" or self._budget < self.step_tokens)

    def _oldest_s(self) -> float:
        return min(entry.added_s for entry in self._waiting)

    def _plan_prefills(self, parts: list[StepPart], budget: int) -> None:
        """Chunks of the running sequences that have no part yet, by right, within the budget."""
        planned = {part.sequence.id for part in parts}
        for entry in self._running:
            sequence = entry.sequence
            if budget == 0:
                return
            if sequence.id in planned:
                continue
            missing = len(sequence.tokens) - sequence.num_computed
            num_tokens = min(missing, budget)
            parts.append(StepPart(sequence, num_tokens, samples=num_tokens == missing))
            budget -= num_tokens
