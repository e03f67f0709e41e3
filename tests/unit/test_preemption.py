"""Preemption: for higher requests, for lack of memory, by swapping; bounded, and never at the cost of a token."""

from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.blocks import BlockAllocator
from scheduling.core.forming import Mode
from scheduling.core.planner import StepPlanner
from scheduling.core.preemption import MAX_SLOT_PREEMPTIONS
from scheduling.core.prefix import PrefixCache
from scheduling.core.sequence import PartResult, Sequence, StepPart
from scheduling.core.swap import SwapSpace
from tests.sequences import make_sequence
from tests.unit.kv_device import KVDevice


def make_device(
    mode: Mode = "continuous",
    batch: int = 2,
    blocks: int = 64,
    step_tokens: int = 64,
    host_blocks: int = 0,
    reuse: bool = False,
    threshold: int = 0,
) -> KVDevice:
    allocator = BlockAllocator(blocks, 4)
    planner = StepPlanner(
        mode,
        batch,
        step_tokens,
        allocator,
        10_000,
        lambda: 0.0,
        prefix=PrefixCache(allocator, key=b"k") if reuse else None,
        swap=SwapSpace(host_blocks, 4, pays=lambda num_tokens: num_tokens > 3) if host_blocks else None,
        long_prefill_threshold=threshold,
    )
    return KVDevice(planner, host_blocks)


def begin_low(device: KVDevice, prompt: int = 10, steps: int = 1) -> Sequence:
    """A low sequence that has run for so many steps when an urgent one comes, which has not begun."""
    low = make_sequence("low", prompt=prompt, output=9, priority=5)
    device.planner.add(low)
    for _ in range(steps):
        device.step()
    device.planner.add(make_sequence("urgent", output=1, priority=0, urgent=True))
    return low


def running(device: KVDevice) -> list[str]:
    return [s.id for s in device.planner.sequences[: device.planner.num_running]]


arrivals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 30), st.integers(1, 24), st.integers(0, 5), st.integers(0, 9)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=250, deadline=None)
@given(
    mode=st.sampled_from(("continuous", "continuous", "continuous", *get_args(Mode))),
    batch=st.integers(1, 5),
    step_tokens=st.integers(4, 40),
    blocks=st.integers(15, 40),
    host_blocks=st.sampled_from([0, 6, 40]),
    reuse=st.booleans(),
    threshold=st.sampled_from([0, 3]),
    arrivals=arrivals,
)
def test_every_request_ends_with_right_keys_and_values_and_preemptions_are_bounded(
    mode: Mode,
    batch: int,
    step_tokens: int,
    blocks: int,
    host_blocks: int,
    reuse: bool,
    threshold: int,
    arrivals: list[tuple[int, int, int, int, int]],
) -> None:
    device = make_device(mode, batch, blocks, step_tokens, host_blocks, reuse, threshold)
    planner = device.planner
    pending = sorted(arrivals)
    ended: dict[str, int] = {}
    for step in range(4000):
        while pending and pending[0][0] <= step:
            _, prompt, output, priority, luck = pending.pop(0)
            room = planner.urgent_room()
            urgent = luck < 4 or (room is not None and priority <= room.max_priority and prompt <= room.tokens)
            failures = max(0, luck - 7)
            planner.add(make_sequence(str(len(pending)), prompt, output, priority, urgent=urgent, failures=failures))
        for output_ in device.step():
            if output_.finish:
                ended[output_.sequence.id] = output_.sequence.num_preemptions
        if not pending and not planner.sequences:
            break
    assert len(ended) == len(arrivals)
    assert all(num <= MAX_SLOT_PREEMPTIONS for num in ended.values())
    assert planner.num_slot_preemptions == sum(ended.values())
    assert planner.allocator.used == 0
    assert planner.swap is None or planner.swap.allocator.used == 0


def test_an_urgent_request_takes_the_slot_of_the_lowest_that_loses_the_least_work() -> None:
    device = make_device(batch=3)
    planner = device.planner
    planner.add(make_sequence("long low", prompt=20, output=9, priority=5))
    planner.add(make_sequence("short low", prompt=4, output=9, priority=5))
    planner.add(make_sequence("normal", prompt=4, output=9, priority=3))
    device.step()
    assert planner.room().requests == 0
    room = planner.urgent_room()
    assert room is not None
    assert room.max_priority == 4
    planner.add(make_sequence("urgent", output=3, priority=1, urgent=True))
    device.step()
    assert running(device) == ["urgent", "normal", "long low"]
    assert device.run() == ["urgent", "normal", "long low", "short low"]
    assert planner.num_slot_preemptions == 1


def test_a_preempted_sequence_keeps_its_place_among_those_that_wait() -> None:
    device = make_device(batch=1)
    planner = device.planner
    planner.add(make_sequence("low", output=9, priority=5))
    device.step()
    planner.add(make_sequence("urgent", output=2, priority=0, urgent=True))
    planner.add(make_sequence("later", output=2, priority=5))
    device.step()
    assert [s.id for s in planner.sequences] == ["urgent", "low", "later"]
    assert device.run() == ["urgent", "low", "later"]


def test_nobody_is_preempted_for_one_of_the_same_level_or_one_that_was_not_claimed_as_urgent() -> None:
    for priority, urgent in ((3, True), (0, False)):
        device = make_device(batch=1)
        device.planner.add(make_sequence("runs", output=9, priority=3))
        device.step()
        device.planner.add(make_sequence("comes", priority=priority, urgent=urgent))
        device.step()
        assert running(device) == ["runs"]


def test_after_its_last_preemption_a_sequence_is_offered_to_nobody() -> None:
    device = make_device(batch=1)
    planner = device.planner
    planner.add(make_sequence("low", prompt=4, output=30, priority=5))
    for number in range(MAX_SLOT_PREEMPTIONS):
        device.step()
        assert planner.urgent_room() is not None
        planner.add(make_sequence(f"urgent {number}", output=1, priority=0, urgent=True))
        device.step()
        assert not planner.num_running
    device.step()
    assert running(device) == ["low"]
    assert planner.urgent_room() is None
    planner.add(make_sequence("one more", output=1, priority=0, urgent=True))
    device.step()
    assert running(device) == ["low"]


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 4), outputs=st.lists(st.integers(1, 6), min_size=1, max_size=6), reuse=st.booleans())
def test_an_endless_stream_of_urgent_requests_holds_nobody_up_for_ever(
    batch: int, outputs: list[int], reuse: bool
) -> None:
    device = make_device(batch=batch, reuse=reuse)
    planner = device.planner
    for number in range(batch):
        planner.add(make_sequence(f"low {number}", output=20, priority=3 + number % 3))
    ended: list[str] = []
    for step in range(2000):
        if planner.urgent_room() is not None or planner.room().requests:
            planner.add(make_sequence(f"urgent {step}", output=outputs[step % len(outputs)], priority=0, urgent=True))
        ended += [output.sequence.id for output in device.step() if output.finish]
        if sum(name.startswith("low") for name in ended) == batch:
            return
    raise AssertionError(f"{[(s.id, s.num_preemptions) for s in planner.sequences]}")


def test_an_urgent_request_takes_memory_too_but_only_where_that_suffices() -> None:
    device = make_device(batch=4, blocks=12)
    planner = device.planner
    planner.add(make_sequence("low", prompt=16, output=4, priority=5))
    planner.add(make_sequence("high", prompt=16, output=4, priority=0))
    device.step()
    planner.add(make_sequence("too large", prompt=32, output=2, priority=1, urgent=True))
    device.step()
    assert running(device) == ["high", "low"]
    planner.remove(planner.sequences[-1])
    planner.add(make_sequence("fits", prompt=20, output=2, priority=1, urgent=True))
    device.step()
    assert running(device) == ["high", "fits"]


def test_nobody_is_preempted_for_blocks_that_the_urgent_request_would_share() -> None:
    device = make_device(batch=3, blocks=10, reuse=True)
    planner = device.planner
    planner.add(make_sequence("low", prompt=24, output=4, priority=5))
    device.step()
    planner.add(make_sequence("high", prompt=12, output=4, priority=0))
    device.step()
    planner.add(make_sequence("same beginning", prompt=33, output=2, priority=1, urgent=True))
    device.step()
    assert running(device) == ["high", "low"]
    assert planner.num_preemptions == 0


def test_other_modes_preempt_nobody_for_a_slot() -> None:
    device = make_device("dynamic", batch=1)
    device.planner.add(make_sequence("low", priority=5))
    device.step()
    assert device.planner.urgent_room() is None


def test_a_swapped_sequence_computes_nothing_again() -> None:
    for host_blocks, again in ((40, 0), (0, 1)):
        device = make_device(batch=1, host_blocks=host_blocks)
        low = begin_low(device, steps=4)
        device.step()
        assert low.num_swapped == (13 if host_blocks else 0)
        assert device.run() == ["low"]
        assert device.num_computed == 10 + 8 + 4 + again * 13


def test_with_a_prefix_cache_a_copy_is_kept_only_of_blocks_that_are_about_to_be_taken() -> None:
    for urgent_prompt, num_out in ((4, 0), (24, 4)):
        device = make_device(batch=1, blocks=8, host_blocks=40, reuse=True)
        planner = device.planner
        planner.add(make_sequence("low", prompt=10, output=9, priority=5))
        for _ in range(4):
            device.step()
        planner.add(make_sequence("urgent", prompt=urgent_prompt, output=1, priority=0, urgent=True))
        device.step()
        assert planner.num_slot_preemptions == 1
        assert planner.swap is not None
        assert planner.swap.num_out == num_out
        assert device.run() == ["low"]
        assert device.num_computed <= 10 + 8 + urgent_prompt + 1, "at most what stood in a block that was not full"


def test_what_is_sooner_computed_again_than_moved_is_not_swapped() -> None:
    device = make_device(batch=1, host_blocks=40)
    low = begin_low(device, prompt=2)
    device.step()
    assert device.planner.num_slot_preemptions == 1
    assert device.planner.swap is not None
    assert (low.num_swapped, device.planner.swap.num_out) == (0, 0)
    assert device.run() == ["low"]


def test_a_full_host_memory_leaves_recomputing() -> None:
    device = make_device(batch=1, host_blocks=2)
    begin_low(device)
    device.step()
    assert device.planner.swap is not None
    assert device.planner.swap.num_out == 0
    assert device.run() == ["low"]


def test_a_cancelled_sequence_gives_up_its_place_in_host_memory() -> None:
    device = make_device(batch=1, host_blocks=20)
    low = begin_low(device)
    device.planner.plan(0.0)
    device.planner.remove(low)
    device.planner.check_integrity()
    assert device.planner.swap is not None
    assert device.planner.swap.allocator.used == 0


def test_a_long_prompt_takes_a_share_of_the_step_while_others_run() -> None:
    device = make_device(batch=3, threshold=8, step_tokens=40)
    planner = device.planner
    planner.add(make_sequence("alone", prompt=60, output=50))
    assert [part.num_tokens for part in planner.plan(0.0)] == [40]
    device.step()
    device.step()
    planner.add(make_sequence("long", prompt=40))
    planner.add(make_sequence("short", prompt=5))
    parts: list[StepPart] = planner.plan(0.0)
    assert [(part.sequence.id, part.num_tokens) for part in parts] == [("alone", 1), ("long", 8), ("short", 5)]


def test_a_poisoned_request_fails_three_times_and_the_innocent_end() -> None:
    """Each round is an engine process; it ends, and all it ran are suspect, in the step that holds the poison."""
    names = [f"r{i}" for i in range(16)]
    failures = dict.fromkeys(names, 0)
    ended: list[str] = []
    rounds = 0
    while any(failures[name] < 3 for name in failures if name not in ended):
        rounds += 1
        device = make_device(batch=16)
        planner = device.planner
        for name in names:
            if name not in ended and failures[name] < 3:
                planner.add(make_sequence(name, output=3, failures=failures[name]))
        while planner.sequences:
            parts = planner.plan(device.now)
            if any(part.sequence.id == "r5" for part in parts):
                for part in parts:
                    failures[part.sequence.id] += 1
                break
            outputs = planner.apply(parts, [PartResult(5 if part.samples else None) for part in parts])
            ended += [output.sequence.id for output in outputs if output.finish]
    assert sorted(ended) == sorted(set(names) - {"r5"})
    assert failures["r5"] == 3
    assert rounds <= 4
