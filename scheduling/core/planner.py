"""Plans the engine one step at a time: who decodes, which prefill chunks join, who is admitted, whom to preempt.

Iteration-level batching as in Orca (Yu et al., OSDI 2022, section 3.1), chunked prefill beside decodes as in
Sarathi-Serve (Agrawal et al., OSDI 2024, section 4), and preemption by recomputing or swapping as in vLLM (Kwon et
al., SOSP 2023, section 4.5).
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Literal, NamedTuple

from scheduling.core.blocks import BlockAllocator
from scheduling.core.forming import BatchFormer, may_join, view_batch
from scheduling.core.forming import Mode as Mode
from scheduling.core.preemption import choose_victims
from scheduling.core.prefix import PrefixCache
from scheduling.core.room import NO_ROOM, Room, UrgentRoom, find_room, find_urgent_room
from scheduling.core.roster import Entry, Roster, by_right
from scheduling.core.sequence import PartResult, Sequence, StepPart, TokenLogprob
from scheduling.core.speculation import Drafter, add_drafts
from scheduling.core.swap import SwapMove, SwapSpace
from scheduling.core.triggers import BatchView, Fired, Trigger, TriggerLog

MIN_STEP_TOKENS = 16
"""`shrink` goes no lower."""


class RequestTooLongError(Exception):
    """Prompt and `max_tokens` together are longer than the model's context or the KV cache."""


class StepOutput(NamedTuple):
    """A token that a step gave a sequence, or its end. One with `finish` or `error` has left the planner.

    `finish` is `stop` after an end-of-sequence token and `length` after `max_tokens`; stop strings are not seen here.
    """

    sequence: Sequence
    token_id: int | None
    finish: Literal["stop", "length"] | None = None
    error: str | None = None
    logprob: TokenLogprob | None = None


class StepPlanner:
    """The batch of one engine: sequences that wait for admission, in order, and those that run, by their right.

    A running sequence holds KV blocks for all tokens it has; decoding takes one more block at a time. A step computes
    at most `step_tokens` tokens, and of one prompt at most `long_prefill_threshold` while others decode (0: no limit).
    `clock` and `now` are seconds of the same clock.

    A sequence that was claimed as urgent takes the slot, and the blocks where those lack, of sequences that are lower
    by a whole priority level; see `choose_victims` for whose, and for what bounds it. In `continuous` mode alone.
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
        prefix: PrefixCache | None = None,
        swap: SwapSpace | None = None,
        trigger: Trigger | None = None,
        long_prefill_threshold: int = 0,
    ) -> None:
        self.step_tokens = step_tokens
        self.allocator = allocator
        self.max_model_len = min(max_model_len, allocator.num_blocks * allocator.block_size)
        self.prefix = prefix
        self.swap = swap
        self.long_prefill_threshold = long_prefill_threshold
        self.num_preemptions = 0
        self.num_slot_preemptions = 0
        """Of these, those in which an urgent sequence took another's place."""
        self._former = BatchFormer(mode, trigger)
        self._roster = Roster(allocator, max(1, int(allocator.num_blocks * watermark)), prefix, swap)
        self.set_batch_size(max_batch_size)
        self._clock = clock
        self._eos_token_ids = eos_token_ids
        self.drafter = drafter
        self._budget = step_tokens

    def add(self, sequence: Sequence) -> None:
        """Take a claimed sequence. Raises RequestTooLongError where it could never end."""
        num_tokens = sequence.num_prompt_tokens + sequence.max_tokens
        if num_tokens > self.max_model_len:
            raise RequestTooLongError(
                f"The prompt has {sequence.num_prompt_tokens} tokens and max_tokens is {sequence.max_tokens}; "
                f"together at most {self.max_model_len} fit."
            )
        self._roster.add(sequence, self._clock())

    def plan(self, now: float) -> list[StepPart]:
        """The parts of the next step: decodes first, then prefill chunks of what runs and of what is admitted now.

        Where a decode lacks a block, the running sequence of least right gives up all of its own.
        """
        parts: list[StepPart] = []
        if self._roster.waiting:
            self._let_urgent_in()
        budget = self._plan_decodes(parts, self._budget)
        if self._roster.waiting:
            self._admit(now)
        self._plan_prefills(parts, budget)
        return parts

    def foresee(self, parts: Items[StepPart]) -> list[Sequence]:
        """Who decodes in the step after this one, if each part gives a token that ends nobody; with a block for it.

        Nobody where more may happen: somebody waits, reads a prompt or is guessed for. Takes blocks that nobody needs,
        and decides nothing: the plan is made when the tokens are known.
        """
        allocator, roster = self.allocator, self._roster
        if self.drafter is not None or roster.waiting or not all(part.samples for part in parts):
            return []
        going = [p.sequence for p in parts if p.sequence.num_output_tokens + 1 < p.sequence.max_tokens]
        for sequence in going:
            if len(sequence.block_table) * allocator.block_size <= len(sequence.tokens):
                if not allocator.can_allocate(roster.watermark_blocks + 1):
                    return []
                sequence.block_table += allocator.allocate(1)
        return going

    def take_moves(self) -> list[SwapMove]:
        """KV blocks to copy from or to host memory before the planned step runs, in this order."""
        return self.swap.take_moves() if self.swap else []

    def apply(self, parts: Items[StepPart], results: Items[PartResult]) -> list[StepOutput]:
        """Record what a step computed; returns each token that a sequence got, and which ended or failed."""
        outputs: list[StepOutput] = []
        for part, result in zip(parts, results, strict=True):
            sequence = part.sequence
            if result.error is not None:
                if self.prefix:
                    self.prefix.retract(sequence)
                self.remove(sequence)
                outputs.append(StepOutput(sequence, None, error=result.error))
                continue
            finish = None
            if result.token_id is None:
                sequence.num_computed += part.num_tokens
            else:
                finish = self._append(sequence, (result.token_id, *result.more), result.logprobs, outputs)
                sequence.num_computed = len(sequence.tokens) - 1
            if self.prefix:
                self.prefix.publish(sequence)
            if finish is not None:
                self.remove(sequence)
        if self._budget < self.step_tokens:
            self._budget = min(self.step_tokens, self._budget + 1 + self._budget // 8)
        return outputs

    def _append(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        outputs: list[StepOutput],
    ) -> Literal["stop", "length"] | None:
        """Give a sequence its new tokens, up to one that ends it."""
        finish = None
        for i, token_id in enumerate(token_ids):
            sequence.tokens.append(token_id)
            finish = self.finish_reason(sequence)
            outputs.append(StepOutput(sequence, token_id, finish, logprob=logprobs[i] if logprobs else None))
            if finish is not None:
                break
        return finish

    def finish_reason(self, sequence: Sequence) -> Literal["stop", "length"] | None:
        """Why a sequence is over, judged by its last token; None while it is not."""
        num_output_tokens = sequence.num_output_tokens
        if not num_output_tokens:
            return None
        last, sampling = sequence.tokens[-1], sequence.sampling
        if (last in self._eos_token_ids and not sampling.ignore_eos) or last in sampling.stop_token_ids:
            return "stop"
        return "length" if num_output_tokens >= sequence.max_tokens else None

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks; one that is not here is ignored."""
        self._roster.remove(sequence)

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
        running = self._roster.running
        shrunk = self._budget > least or len(running) > 1
        self._budget = max(least, self._budget // 2)
        if len(running) > 1:
            self._preempt(running[-1], keeps=False)  # a copy to the host would need memory on the device
        return shrunk

    def postpone(self, sequence: Sequence) -> None:
        """Let a running sequence wait behind all others, be computed again, and give way to them from now on."""
        self._roster.postpone(sequence)
        self.num_preemptions += 1

    def room(self) -> Room:
        """What may be claimed now, to run in the next step or the one after it."""
        return NO_ROOM if self._is_closed else find_room(self._roster, self.max_batch_size)

    def urgent_room(self) -> UrgentRoom | None:
        """What may be claimed beyond `room`, marked as urgent, to take a lower one's place."""
        if self.mode != "continuous" or self._is_closed:
            return None
        return find_urgent_room(self._roster, self.max_batch_size)

    def due_s(self, now: float) -> float | None:
        """Seconds until `plan` has something to run; None where nothing is here."""
        if not len(self._roster):
            return None
        if self._roster.running or not self._former.collects:
            return 0.0
        return self._former.due_s(self._view(now), self.max_batch_size)

    @property
    def mode(self) -> Mode:
        return self._former.mode

    def set_mode(self, mode: Mode) -> None:
        """From the next plan on; what runs goes on."""
        self._former.mode = mode
        self.set_batch_size(self._batch_size)

    def set_trigger(self, trigger: Trigger | None) -> None:
        """What starts `dynamic` and `static` batches from now on; None for the mode's own way."""
        self._former.trigger = trigger

    def set_batch_size(self, max_batch_size: int) -> None:
        """From the next plan on; where more run already, they go on and none joins them. Raises ValueError below 1."""
        if max_batch_size < 1:
            raise ValueError(f"A batch holds at least one sequence, not {max_batch_size}.")
        self._batch_size = max_batch_size
        self.max_batch_size = 1 if self.mode == "serial" else min(max_batch_size, self.step_tokens)

    @property
    def batch_size(self) -> int:
        """The size that was set; `max_batch_size` is what the mode and the step's budget leave of it."""
        return self._batch_size

    @property
    def trigger_log(self) -> TriggerLog:
        """What started batches."""
        return self._former.log

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences here: the running ones by their right, then the waiting ones in order."""
        return self._roster.sequences

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    def check_integrity(self) -> None:
        """Assert that blocks, lists and index agree."""
        self._roster.check_integrity()

    def _plan_decodes(self, parts: list[StepPart], budget: int) -> int:
        """One token of each sequence whose other tokens are all computed, and drafts; returns the budget left.

        Goes by right, so that a sequence that loses its blocks here was not planned yet.
        """
        roster = self._roster
        for entry in tuple(roster.running):
            sequence = entry.sequence
            if len(parts) == budget:
                break
            if entry.running and sequence.num_computed == len(sequence.tokens) - 1 and self._grow(entry):
                parts.append(StepPart(sequence, 1, samples=True))
        budget -= len(parts)
        if self.drafter is not None and parts:
            spare = budget - (len(roster.running) - len(parts))  # whoever reads a prompt gets on, too
            budget -= add_drafts(self.drafter, parts, spare, self.allocator, roster.watermark_blocks)
        return budget

    def _grow(self, entry: Entry) -> bool:
        """Give a running sequence the block for its last token; False where it had to give up its own instead."""
        sequence, allocator = entry.sequence, self.allocator
        if len(sequence.block_table) * allocator.block_size >= len(sequence.tokens):
            return True
        while not allocator.num_free:
            victim = self._roster.running[-1]
            self._preempt(victim)
            if victim is entry:
                return False
        sequence.block_table += allocator.allocate(1)
        return True

    def _preempt(self, victim: Entry, *, keeps: bool = True) -> None:
        """Take a running sequence's blocks; it waits at its old place."""
        self._roster.stop(victim, keeps=keeps)
        self.num_preemptions += 1

    def _let_urgent_in(self) -> None:
        """Start urgent sequences, in the place of lower ones where slots or blocks lack."""
        roster, allocator = self._roster, self.allocator
        while roster.waiting and roster.running and not self._is_closed and not roster.num_suspects:
            entry = min(roster.waiting, key=by_right)
            if not entry.sequence.is_urgent:
                return
            shared, num_blocks = roster.blocks_needed(entry.sequence)
            num_missing = num_blocks + roster.watermark_blocks - allocator.num_free
            victims = choose_victims(
                roster.running,
                entry,
                num_slots=len(roster.running) + 1 - self.max_batch_size,
                num_blocks=num_missing,
                allocator=allocator,
                shared=set(shared),
            )
            if victims is None:
                return
            for victim in victims:
                victim.sequence.num_preemptions += 1
                self.num_slot_preemptions += 1
                # Where slots alone lack, a prefix cache keeps its blocks, and better than a copy would.
                self._preempt(victim, keeps=roster.prefix is None or num_missing > 0)
            if not roster.start(entry):
                return

    def _admit(self, now: float) -> None:
        """Let waiting sequences into the batch, strictly in order, while slots and blocks for all their tokens last.

        Above the watermark only, so that what runs can grow; but whoever would run alone always gets in.
        """
        roster, fired = self._roster, None
        if roster.running:
            if self._is_closed:
                return
        elif self._former.collects:
            fired = self._former.check(self._view(now), self.max_batch_size)
            if fired is None:
                return
            self._former.log.note(fired)
        for entry in self._invited(fired):
            if len(roster.running) >= self.max_batch_size or not may_join(entry, roster.running, self.max_batch_size):
                return
            if not roster.start(entry):
                return

    def _invited(self, fired: Fired | None) -> list[Entry]:
        """Who may be admitted now: all who wait, or the most urgent alone."""
        waiting = self._roster.waiting
        if fired is None or not fired.alone:
            return waiting[: self.max_batch_size]
        urgent = min(entry.sequence.priority for entry in waiting)
        return [entry for entry in waiting if entry.sequence.priority == urgent]

    @property
    def _is_closed(self) -> bool:
        """Whether what runs takes nobody in."""
        return bool(self._roster.running) and (self.mode != "continuous" or self._budget < self.step_tokens)

    def _view(self, now: float) -> BatchView:
        """What triggers see; only while nothing runs, so what waits is all that will need blocks."""
        allocator, waiting = self.allocator, self._roster.waiting
        left = allocator.num_free - sum(allocator.blocks_for(len(entry.sequence.tokens)) for entry in waiting)
        return view_batch(waiting, now, max(0, left) / allocator.num_blocks)

    def _plan_prefills(self, parts: list[StepPart], budget: int) -> None:
        """Chunks of the running sequences that have no part yet, by right, within the budget."""
        running = self._roster.running
        if len(parts) == len(running):
            return
        planned = {part.sequence.id for part in parts}
        most = self.long_prefill_threshold if self.long_prefill_threshold and parts else budget
        for entry in running:
            sequence = entry.sequence
            if budget == 0:
                return
            if sequence.id in planned:
                continue
            missing = len(sequence.tokens) - sequence.num_computed
            num_tokens = min(missing, budget, most)
            parts.append(StepPart(sequence, num_tokens, samples=num_tokens == missing))
            budget -= num_tokens
