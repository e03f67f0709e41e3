"""KV blocks of a simulated engine: what a preempted sequence still finds of its own when it goes on."""

from scheduling.core.blocks import BlockAllocator
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import Sequence


class CountingBlocks(BlockAllocator):
    """Counts the blocks that were ever taken: the age of what was let go."""

    num_taken = 0

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks. Takes none and raises OutOfBlocksError where too few are free."""
        taken = super().allocate(num_blocks)
        self.num_taken += num_blocks
        return taken


class OwnPrefix(PrefixCache):
    """Lets a preempted sequence find the blocks that it had filled, as long as an engine would keep them.

    An engine's free blocks are nearly all of known content, and are taken in the order in which they were let go. Here
    only those of preempted sequences are named, since to name all would cost a simulation more than its planning; they
    count as taken once as many others were as were free before them. Nobody finds another's: all simulated tokens are
    alike, and nothing is known of what real prompts share.
    """

    def __init__(self, allocator: CountingBlocks) -> None:
        super().__init__(allocator, key=b"")
        self._blocks = allocator
        self._left: dict[str, tuple[int, int]] = {}
        """Sequence id -> how many blocks it let go, and how many had been taken in all when its last one was next."""

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks that a preempted sequence left and that are still there; its last go first."""
        if sequence.id not in self._left:
            return []
        num_blocks, taken_from = self._left[sequence.id]
        num_lost = max(0, self._blocks.num_taken - taken_from)
        return super().find(sequence)[: max(0, num_blocks - num_lost)]

    def publish(self, sequence: Sequence) -> None:
        """What runs is looked for by nobody."""

    def leave(self, sequence: Sequence) -> None:
        """Name what a preempted sequence lets go."""
        super().publish(sequence)
        self._left[sequence.id] = (len(sequence.block_table), self._blocks.num_taken + self._blocks.num_free)

    def _name(self, sequence: Sequence, index: int) -> bytes:
        return b"%b/%d" % (sequence.id.encode(), index)
