"""Whom to preempt for a higher request, and what keeps that within bounds."""

from collections.abc import Collection
from collections.abc import Sequence as Items

from scheduling.core.blocks import BlockAllocator
from scheduling.core.roster import Entry

MAX_SLOT_PREEMPTIONS = 2
"""How often a sequence loses its slot to a higher one; after that it runs to its end unless memory lacks."""


def choose_victims(
    running: Items[Entry],
    entry: Entry,
    *,
    num_slots: int,
    num_blocks: int,
    allocator: BlockAllocator,
    shared: Collection[int] = (),
) -> list[Entry] | None:
    """Whom `entry` may replace to get so many slots and blocks; None where those who may be are too few.

    `shared`: blocks that it would share, so that nothing is gained when others let go of them.

    Only sequences lower by a whole priority level, and none more often than MAX_SLOT_PREEMPTIONS: so a request can be
    held up by any number of higher ones and still ends, and n requests are preempted in this way 2 n times at most.
    Those of the lowest level go first, and among them the ones that lose the least work.
    """
    eligible = [
        other
        for other in running
        if other.sequence.priority > entry.sequence.priority and other.sequence.num_preemptions < MAX_SLOT_PREEMPTIONS
    ]
    eligible.sort(key=lambda other: (-other.sequence.priority, other.sequence.num_computed))
    victims = []
    for victim in eligible:
        if num_slots <= 0 and num_blocks <= 0:
            break
        victims.append(victim)
        num_slots -= 1
        num_blocks -= allocator.num_own(block for block in victim.sequence.block_table if block not in shared)
    return victims if num_slots <= 0 and num_blocks <= 0 else None
