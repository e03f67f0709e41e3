"""How much more an engine may claim: for free slots and blocks, and for urgent requests at the cost of lower ones."""

from typing import NamedTuple

from scheduling.core.preemption import MAX_SLOT_PREEMPTIONS
from scheduling.core.roster import Roster
from scheduling.core.sequence import Sequence


class Room(NamedTuple):
    """What may be claimed now: so many requests, whose prompts together have at most `tokens` tokens."""

    requests: int
    tokens: int


class UrgentRoom(NamedTuple):
    """One request of this priority number or lower may be claimed to take the slot, and memory, of a lower one."""

    max_priority: int
    tokens: int


NO_ROOM = Room(0, 0)
URGENT_PERIOD_S = 0.05
"""How often a full engine looks for a request that may take the place of a lower one."""


def is_ending(sequence: Sequence) -> bool:
    """Whether the next step gives the last token that `max_tokens` allows."""
    return (
        sequence.num_prompt_tokens + sequence.max_tokens - len(sequence.tokens) == 1
        and len(sequence.tokens) - sequence.num_computed == 1
    )


def find_room(roster: Roster, max_batch_size: int) -> Room:
    """What fits in beside what is here.

    A sequence whose next token is surely its last makes room already: what is claimed during that step takes its place
    without a gap. With nothing here there is room for the whole KV cache. Prompts are counted as if nobody shared their
    blocks.
    """
    allocator, waiting, running = roster.allocator, roster.waiting, roster.running
    ending = [entry.sequence for entry in running if is_ending(entry.sequence)]
    requests = max_batch_size - len(waiting) - len(running) + len(ending)
    if requests <= 0 or roster.num_suspects:
        return NO_ROOM
    free = allocator.num_free + sum(allocator.num_own(sequence.block_table) for sequence in ending)
    if len(roster):
        promised = sum(allocator.blocks_for(len(entry.sequence.tokens)) for entry in waiting)
        free -= roster.watermark_blocks + promised
    return Room(requests, max(0, free) * allocator.block_size)


def find_urgent_room(roster: Roster, max_batch_size: int) -> UrgentRoom | None:
    """What a higher request may have in a lower one's place; None for nothing.

    One at a time, and never more sequences here than two batches hold.
    """
    if roster.num_suspects or len(roster) >= 2 * max_batch_size:
        return None
    if any(entry.sequence.is_urgent for entry in roster.waiting):
        return None
    able = [e.sequence for e in roster.running if e.sequence.num_preemptions < MAX_SLOT_PREEMPTIONS]
    lowest = max((sequence.priority for sequence in able), default=0)
    if lowest == 0:
        return None
    allocator = roster.allocator
    free = allocator.num_free - roster.watermark_blocks
    free += sum(allocator.num_own(sequence.block_table) for sequence in able if sequence.priority == lowest)
    return UrgentRoom(lowest - 1, max(0, free) * allocator.block_size)
