"""Accounting of KV cache blocks: which are free, which are held, whose content is known. The tensors live elsewhere."""

from collections import Counter
from collections.abc import Iterable


class OutOfBlocksError(Exception):
    """More KV blocks were asked for than are free."""


class BlockAllocator:
    """Hands out the numbers of `num_blocks` KV blocks, each of which holds keys and values of `block_size` tokens.

    Several sequences may hold one block. One whose content was published stays findable after its last holder has let
    go, until its place is needed: such idle blocks count as free and are taken last, least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"A KV cache needs at least one block of one token, not {num_blocks} of {block_size}.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}
        """In the order in which their last holders let go."""
        self._holders = [0] * num_blocks
        self._contents: dict[int, bytes] = {}
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be found."""
        return len(self._idle)

    @property
    def used(self) -> int:
        """Number of blocks held."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether so many blocks are free."""
        return num_blocks <= self.num_free

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, lately freed ones first. Takes none and raises OutOfBlocksError where too few are free."""
        if num_blocks > self.num_free:
            raise OutOfBlocksError(f"{num_blocks} KV blocks asked for, {self.num_free} free")
        taken = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """Become one more holder of published blocks."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def free(self, block_table: list[int]) -> None:
        """Let go of every block of a table and empty the table. Its last blocks are the first to be evicted."""
        for block in reversed(block_table):
            assert self._holders[block], f"block {block} freed twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._contents:
                self._idle[block] = None
            else:
                self._free.append(block)
        block_table.clear()

    def publish(self, block: int, content: bytes) -> None:
        """Make a held block findable by its content; where another one has the same content, that one stays it."""
        assert self._holders[block], f"block {block} is published by nobody who holds it"
        if content not in self._published and block not in self._contents:
            self._published[content] = block
            self._contents[block] = content

    def find(self, content: bytes) -> int | None:
        """The block of this content, held or idle; None where there is none any more."""
        return self._published.get(content)

    def retract(self, blocks: Iterable[int]) -> None:
        """Make held blocks findable no more: their content is in doubt."""
        for block in blocks:
            content = self._contents.pop(block, None)
            if content is not None:
                del self._published[content]

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these published blocks nobody holds, so that holding them takes them from the free ones."""
        return sum(not self._holders[block] for block in blocks)

    def num_own(self, blocks: Iterable[int]) -> int:
        """How many of these held blocks have a single holder, who would free them by letting go."""
        return sum(self._holders[block] == 1 for block in blocks)

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Assert that each block is free, idle, or held as often as it stands in `block_tables`, those of all holders.

        And that the index of contents knows exactly the published blocks.
        """
        held = Counter(block for table in block_tables for block in table)
        assert sorted([*self._free, *self._idle, *held]) == list(range(self.num_blocks)), "a KV block was lost"
        assert all(self._holders[block] == held[block] for block in range(self.num_blocks)), "holders are miscounted"
        assert {content: block for block, content in self._contents.items()} == self._published
        assert self._idle.keys() <= self._contents.keys(), "a block is kept whose content nobody can ask for"
        assert not any(block in self._contents for block in self._free)

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        del self._published[self._contents.pop(block)]
        return block
