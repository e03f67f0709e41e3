"""Accounting of KV cache blocks: which are free, which are held. The tensors live in the model runner."""


class OutOfBlocksError(Exception):
    """More KV blocks were asked for than are free."""


class BlockAllocator:
    """Hands out the numbers of `num_blocks` KV blocks, each of which holds keys and values of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"A KV cache needs at least one block of one token, not {num_blocks} of {block_size}.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        """Number of blocks held."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether so many blocks are free."""
        return num_blocks <= len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, lately freed ones first. Takes none and raises OutOfBlocksError where too few are free."""
        if num_blocks > len(self._free):
            raise OutOfBlocksError(f"{num_blocks} KV blocks asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._held[block] = 1
        return taken

    def free(self, block_table: list[int]) -> None:
        """Give back every block of a table and empty the table."""
        for block in reversed(block_table):
            assert self._held[block], f"block {block} freed twice"
            self._held[block] = 0
            self._free.append(block)
        block_table.clear()

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Assert that every block is either free or in exactly one of `block_tables`, the tables of all holders."""
        blocks = self._free + [block for table in block_tables for block in table]
        assert sorted(blocks) == list(range(self.num_blocks)), "a KV block was lost or is held twice"
        assert sum(self._held) == self.used, "the marks of held KV blocks do not agree with the free list"
