"""A simulated engine's KV blocks: a preempted sequence finds its own until others would have taken them."""

from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.simulation.memory import CountingBlocks, OwnPrefix
from tests.sequences import make_sequence


@given(taken=st.integers(0, 20), kept=st.booleans())
def test_a_preempted_sequence_finds_its_first_blocks_until_others_take_them(taken: int, kept: bool) -> None:
    blocks = CountingBlocks(16, 4)
    prefix = OwnPrefix(blocks)
    one, other = make_sequence("one", prompt=30), make_sequence("other", prompt=30)
    one.block_table += blocks.allocate(8)
    one.num_computed = 29
    table = list(one.block_table)
    prefix.publish(one)
    assert prefix.find(one) == []
    prefix.leave(one)
    blocks.free(one.block_table)
    for _ in range(min(taken, 16)):
        block = blocks.allocate(1)
        if not kept:
            blocks.free(block)  # with content that nobody names here; an engine would keep it, and take an older one
    # Eight others were free before it; then its last blocks go first, and the last of all was not full.
    assert prefix.find(one) == table[: min(7, max(0, 16 - taken))]
    assert prefix.find(other) == []


def test_what_is_found_is_held_again_and_taken_by_nobody() -> None:
    blocks = CountingBlocks(8, 4)
    prefix = OwnPrefix(blocks)
    one = make_sequence("one", prompt=16)
    one.block_table += blocks.allocate(4)
    one.num_computed = 15
    prefix.leave(one)
    table = list(one.block_table)
    blocks.free(one.block_table)
    found = prefix.find(one)
    assert found == table[:3]
    blocks.hold(found)
    assert blocks.num_free == 5
    assert not set(blocks.allocate(5)) & set(found)
