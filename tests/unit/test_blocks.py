"""The block allocator: no block is lost, held twice, or made up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.blocks import BlockAllocator, OutOfBlocksError


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_blocks_are_conserved(operations: list[tuple[bool, int]]) -> None:
    allocator = BlockAllocator(20, 16)
    tables: list[list[int]] = []
    for takes, number in operations:
        if not takes and tables:
            allocator.free(tables.pop(number % len(tables)))
        elif allocator.can_allocate(number):
            tables.append(allocator.allocate(number))
        else:
            with pytest.raises(OutOfBlocksError):
                allocator.allocate(number)
        allocator.check_integrity(tables)
        assert allocator.used == sum(map(len, tables)) == 20 - allocator.num_free


def test_a_lost_block_is_noticed() -> None:
    allocator = BlockAllocator(4, 16)
    allocator.allocate(1)
    with pytest.raises(AssertionError, match="lost"):
        allocator.check_integrity([])


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockAllocator(4, 16).blocks_for(num_tokens) == num_blocks


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockAllocator(0, 16)
