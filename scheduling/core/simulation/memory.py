"""KV blocks of a simulated engine: what a preempted sequence still finds of its own when it goes on."""

from collections import OrderedDict

from scheduling.core.blocks import BlockAllocator, OutOfBlocksError
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import Sequence


class AgeingBlocks(BlockAllocator):
    """Takes the blocks that were let go longest ago.

    An engine with a prefix cache has published nearly all that it let go, and takes such blocks in that order. To name
    the blocks of those that ended, too, would cost a simulation more than their planning.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self._free = []
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks. Takes none and raises OutOfBlocksError where too few are free."""
        idle, contents, holders = self._idle, self._contents, self._holders
        if num_blocks > len(idle):
            raise OutOfBlocksError(f"{num_blocks} KV blocks asked for, {len(idle)} free")
        taken = []
        for _ in range(num_blocks):
            block, _nothing = idle.popitem(last=False)
            holders[block] = 1
            if block in contents:
                del self._published[contents.pop(block)]
            taken.append(block)
        return taken

    def free(self, block_table: list[int]) -> None:
        """Let go of every block of a table and empty the table. Its last blocks are the first to be taken."""
        idle, holders = self._idle, self._holders
        for block in reversed(block_table):
            assert holders[block] == 1, f"block {block} freed twice"
            holders[block] = 0
            idle[block] = None
        block_table.clear()


class OwnPrefix(PrefixCache):
    """Lets a preempted sequence find the blocks that it had filled, until others take them.

    Nobody finds another's: all simulated tokens are alike, and nothing is known of what real prompts shared.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        super().__init__(allocator, key=b"")

    def publish(self, sequence: Sequence) -> None:
        """What runs is looked for by nobody."""

    def leave(self, sequence: Sequence) -> None:
        """Name what a preempted sequence lets go."""
        super().publish(sequence)

    def _name(self, sequence: Sequence, index: int) -> bytes:
        return b"%b/%d" % (sequence.id.encode(), index)
