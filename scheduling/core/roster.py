"""Who waits for the batch, in order, who runs in it, by their right, and the KV blocks that they hold."""

from bisect import insort
from dataclasses import dataclass

from scheduling.core.blocks import BlockAllocator
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import Sequence
from scheduling.core.swap import SwapSpace

LEAST = 2**31
"""Below every priority."""


@dataclass(slots=True, eq=False)
class Entry:
    """A sequence in the planner's care."""

    sequence: Sequence
    order: int
    """Its place among the waiting: the order of arrival here, which is the policy's. A preempted one keeps it."""
    added_s: float
    right: tuple[int, float, int]
    """Least first. Who stands last gives up its blocks first."""
    running: bool = False
    was_admitted: bool = False
    """It has run before, and was preempted."""


def by_order(entry: Entry) -> int:
    """Sort key of the waiting."""
    return entry.order


def by_right(entry: Entry) -> tuple[int, float, int]:
    """Sort key of the running."""
    return entry.right


class Roster:
    """The sequences of one planner. The lists are read by the planner and changed here alone.

    Who runs holds blocks for all its tokens, who waits holds none. `watermark_blocks` stay free when one starts beside
    others, so that those can grow.
    """

    def __init__(
        self, allocator: BlockAllocator, watermark_blocks: int, prefix: PrefixCache | None, swap: SwapSpace | None
    ) -> None:
        self.allocator = allocator
        self.watermark_blocks = watermark_blocks
        self.prefix = prefix
        self.swap = swap
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.num_suspects = 0
        """Sequences over which an engine process has ended before."""
        self._entries: dict[str, Entry] = {}
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def sequences(self) -> list[Sequence]:
        """The running ones by their right, then the waiting ones in order."""
        return [entry.sequence for entry in (*self.running, *self.waiting)]

    def add(self, sequence: Sequence, now: float) -> None:
        """Let a new sequence wait behind all others."""
        assert sequence.id not in self._entries, f"{sequence.id} is here already"
        self._num_added += 1
        right = (sequence.priority, sequence.arrival_s, self._num_added)
        entry = Entry(sequence, self._num_added, now, right)
        self._entries[sequence.id] = entry
        self.waiting.append(entry)
        self.num_suspects += bool(sequence.failures)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks; one that is not here is ignored."""
        entry = self._entries.pop(sequence.id, None)
        if entry is None:
            return
        (self.running if entry.running else self.waiting).remove(entry)
        self.num_suspects -= bool(sequence.failures)
        self.allocator.free(sequence.block_table)
        if self.swap:
            self.swap.drop(sequence)

    def blocks_needed(self, sequence: Sequence) -> tuple[list[int], int]:
        """Cached blocks that a sequence would share, and how many free ones (idle ones too) it would take."""
        found = self.prefix.find(sequence) if self.prefix else []
        num_new = self.allocator.blocks_for(len(sequence.tokens)) - len(found)
        return found, num_new + self.allocator.num_idle(found)

    def start(self, entry: Entry) -> bool:
        """Give a waiting sequence blocks for all its tokens and let it run; False where too few are free.

        Whoever would run alone always gets them.
        """
        sequence, allocator = entry.sequence, self.allocator
        found, needed = self.blocks_needed(sequence)
        if self.running and not allocator.can_allocate(needed + self.watermark_blocks):
            return False
        allocator.hold(found)
        sequence.block_table += found
        sequence.block_table += allocator.allocate(allocator.blocks_for(len(sequence.tokens)) - len(found))
        sequence.num_computed = len(found) * allocator.block_size
        sequence.num_published = len(found)
        if self.prefix and not entry.was_admitted:
            self.prefix.count(sequence, len(found))
        entry.was_admitted = True
        if sequence.host_table:
            assert self.swap is not None
            self.swap.bring_back(sequence)
        self.waiting.remove(entry)
        entry.running = True
        insort(self.running, entry, key=by_right)
        return True

    def stop(self, entry: Entry, *, keeps: bool) -> None:
        """Take a running sequence's blocks; it waits at its old place.

        Its tokens are computed again, but for those that are still found in the cache then, or were kept (`keeps`) in
        host memory.
        """
        sequence = entry.sequence
        self.running.remove(entry)
        entry.running = False
        insort(self.waiting, entry, key=by_order)
        if self.swap and keeps:
            self.swap.keep(sequence)
        if self.prefix:
            self.prefix.leave(sequence)
        self.allocator.free(sequence.block_table)
        sequence.num_computed = sequence.num_published = 0
        sequence.lookup = None  # what a draft model has computed stood in the blocks, too

    def postpone(self, sequence: Sequence) -> None:
        """Let a running sequence wait behind all others, and be the first to give up its blocks."""
        entry = self._entries[sequence.id]
        self.stop(entry, keeps=False)
        self._num_added += 1
        entry.order = self._num_added
        entry.right = (LEAST, sequence.arrival_s, self._num_added)
        self.waiting.sort(key=by_order)

    def check_integrity(self) -> None:
        """Assert that blocks, lists and index agree."""
        sequences = self.sequences
        assert len(self._entries) == len(sequences)
        assert self.running == sorted(self.running, key=by_right)
        assert self.waiting == sorted(self.waiting, key=by_order)
        assert self.num_suspects == sum(bool(sequence.failures) for sequence in sequences)
        self.allocator.check_integrity([sequence.block_table for sequence in sequences])
        if self.swap:
            self.swap.allocator.check_integrity([sequence.host_table for sequence in sequences])
        for entry in self.running:
            held = len(entry.sequence.block_table) * self.allocator.block_size
            assert entry.running
            assert entry.sequence.num_computed <= min(held, len(entry.sequence.tokens))
            assert not entry.sequence.host_table
        for entry in self.waiting:
            assert not entry.running
            assert not entry.sequence.block_table
            assert not entry.sequence.num_computed
