"""Keeping what a preempted sequence has computed in host memory, where moving it is cheaper than computing it again."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from scheduling.core.blocks import BlockAllocator
from scheduling.core.sequence import Sequence


class SwapMove(NamedTuple):
    """Blocks to copy before the next step, and before the moves that come after this one.

    `pairs` are (device block, host block) for `out` and (host block, device block) for `in`.
    """

    direction: Literal["out", "in"]
    pairs: list[tuple[int, int]]


class SwapSpace:
    """Blocks of host memory that keep what preempted sequences have computed, where that is cheaper than computing.

    Swapping against recomputing as in vLLM (Kwon et al., SOSP 2023, section 4.5). Accounting only: `take_moves` says
    what is to be copied.
    """

    def __init__(self, num_blocks: int, block_size: int, pays: Callable[[int], bool]) -> None:
        """`pays`: whether moving so many tokens out and back costs less time than computing them again."""
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.num_out = 0
        """Blocks moved out and back so far."""
        self.num_in = 0
        self._pays = pays
        self._moves: list[SwapMove] = []

    def keep(self, sequence: Sequence) -> bool:
        """Move a sequence's blocks out, before they are freed; False where it is to be computed again."""
        num_blocks = self.allocator.blocks_for(sequence.num_computed)
        if not num_blocks or not self.allocator.can_allocate(num_blocks) or not self._pays(sequence.num_computed):
            return False
        sequence.host_table += self.allocator.allocate(num_blocks)
        sequence.num_swapped = sequence.num_computed
        self._moves.append(SwapMove("out", list(zip(sequence.block_table, sequence.host_table, strict=False))))
        self.num_out += num_blocks
        return True

    def bring_back(self, sequence: Sequence) -> None:
        """Move in what the sequence's new blocks do not hold yet, from `num_computed` on, and count it as computed."""
        first = sequence.num_computed // self.allocator.block_size
        pairs = list(zip(sequence.host_table[first:], sequence.block_table[first:], strict=False))
        if pairs:
            self._moves.append(SwapMove("in", pairs))
            self.num_in += len(pairs)
            sequence.num_computed = max(sequence.num_computed, sequence.num_swapped)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Give up a sequence's place in host memory."""
        self.allocator.free(sequence.host_table)
        sequence.num_swapped = 0

    def take_moves(self) -> list[SwapMove]:
        """What is to be copied before the next step, in this order."""
        moves, self._moves = self._moves, []
        return moves
