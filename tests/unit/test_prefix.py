"""Prefix reuse: blocks found by content, shared while held, kept while their place is not needed, never wrong."""

from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import PartResult, SamplingParams, Sequence
from tests.unit.kv_device import KVDevice

KEY = b"k" * 32
LONG = list(range(100, 150))


def make_sequence(name: str, prompt: list[int], output: int = 3, tenant: str = "t") -> Sequence:
    return Sequence(
        id=name,
        attempt=1,
        tenant=tenant,
        priority=3,
        arrival_s=0.0,
        tokens=list(prompt),
        num_prompt_tokens=len(prompt),
        max_tokens=output,
        sampling=SamplingParams(),
    )


def make_device(blocks: int = 64, per_tenant: bool = False, batch: int = 4) -> KVDevice:
    allocator = BlockAllocator(blocks, 4)
    prefix = PrefixCache(allocator, key=KEY, per_tenant=per_tenant)
    return KVDevice(StepPlanner("continuous", batch, 64, allocator, 10_000, lambda: 0.0, prefix=prefix))


def serve(device: KVDevice, sequence: Sequence) -> int:
    """Run one sequence to its end; how many tokens that computed."""
    before = device.num_computed
    device.planner.add(sequence)
    device.run()
    return device.num_computed - before


def test_a_prompt_that_begins_alike_computes_only_the_rest() -> None:
    device = make_device()
    assert serve(device, make_sequence("first", LONG)) == 50 + 2
    second = make_sequence("second", [*LONG[:30], 1, 2, 3])
    assert serve(device, second) == (33 - 28) + 2
    assert second.num_cached == 28
    prefix = device.planner.prefix
    assert prefix is not None
    assert (prefix.num_tokens, prefix.num_hit_tokens) == (48 + 32, 28)


def test_the_last_token_is_always_computed() -> None:
    device = make_device()
    serve(device, make_sequence("first", LONG[:32], output=1))
    again = make_sequence("again", LONG[:32], output=1)
    assert serve(device, again) == 4
    assert again.num_cached == 28


def test_blocks_of_running_sequences_are_shared_and_freed_by_the_last_holder() -> None:
    device = make_device()
    device.planner.add(make_sequence("a", LONG, output=20))
    device.step()
    used = device.planner.allocator.used
    device.planner.add(make_sequence("b", LONG, output=40))
    device.step()
    assert device.planner.allocator.used == used + 1
    device.run()
    assert device.planner.allocator.used == 0
    assert device.planner.allocator.num_cached > 0


def test_answers_are_found_by_the_next_turn_of_a_conversation() -> None:
    device = make_device()
    first = make_sequence("first", LONG[:10], output=22)
    serve(device, first)
    second = make_sequence("second", [*first.tokens, 9, 9])
    serve(device, second)
    assert second.num_cached == 28


def test_tenants_find_each_others_blocks_only_where_that_is_allowed() -> None:
    for per_tenant, expected in ((False, 48), (True, 0)):
        device = make_device(per_tenant=per_tenant)
        serve(device, make_sequence("ada", LONG, tenant="ada"))
        other = make_sequence("bob", LONG, tenant="bob")
        serve(device, other)
        assert other.num_cached == expected
        same = make_sequence("ada again", LONG, tenant="ada")
        serve(device, same)
        assert same.num_cached == 48


def test_blocks_not_used_for_longest_go_first_and_the_ends_of_prompts_before_their_beginnings() -> None:
    device = make_device(blocks=20)
    serve(device, make_sequence("old", LONG[:32], output=1))
    serve(device, make_sequence("new", [7] * 32, output=1))
    assert device.planner.allocator.num_cached == 16
    serve(device, make_sequence("big", [8] * 38, output=1))
    old, new = make_sequence("old again", LONG[:33], output=1), make_sequence("new again", [7] * 33, output=1)
    prefix = device.planner.prefix
    assert prefix is not None
    assert (len(prefix.find(old)), len(prefix.find(new))) == (2, 8)


def test_names_depend_on_all_tokens_before_and_on_the_key() -> None:
    allocator = BlockAllocator(8, 4)
    prefix, other = PrefixCache(allocator, key=KEY), PrefixCache(allocator, key=b"x" * 32)
    sequence = make_sequence("a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    sequence.block_table = allocator.allocate(3)
    sequence.num_computed = 8
    prefix.publish(sequence)
    assert prefix.find(make_sequence("b", [1, 2, 3, 4, 5, 6, 7, 8, 0])) == sequence.block_table[:2]
    assert prefix.find(make_sequence("c", [0, 2, 3, 4, 5, 6, 7, 8, 9])) == []
    assert other.find(make_sequence("d", [1, 2, 3, 4, 5, 6, 7, 8, 9])) == []


def test_nobody_finds_what_a_failed_sequence_computed() -> None:
    device = make_device()
    planner = device.planner
    planner.add(make_sequence("bad", [3] * 65))
    device.step()
    planner.apply(planner.plan(0.0), [PartResult(error="not finite")])
    planner.check_integrity()
    after = make_sequence("after", [3] * 65)
    serve(device, after)
    assert after.num_cached == 0


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    device = make_device(blocks=24, batch=2)
    device.planner.add(make_sequence("stays", LONG[:36], output=30))
    device.planner.add(make_sequence("yields", [1, *LONG[:36]], output=30))
    ended = device.run()
    assert device.planner.num_preemptions > 0
    assert ended == ["stays", "yields"]
    assert device.num_computed < 36 + 37 + 2 * 29 + 37
