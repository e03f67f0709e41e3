"""The bound that memory sets to a batch: by the model's shape, what the device has left, and what was measured."""

import msgspec

from inference.messages import Telemetry
from inference.worker.memory import DeviceMemory
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import SamplingParams, Sequence
from scheduling.core.sizing.memory_model import BatchShape, MemoryModel, ModelShape

MIB = 2**20
SHAPE = ModelShape(
    num_layers=24, hidden_size=1024, num_heads=16, num_kv_heads=16, head_dim=64, intermediate_size=4096,
    vocab_size=32_000, num_parameters=350_000_000,
)  # fmt: skip
GPU = Telemetry(
    source="nvml", device="a GPU", memory_used_bytes=6_000 * MIB, memory_total_bytes=16_000 * MIB,
    process_memory_bytes=6_000 * MIB,
)  # fmt: skip


def make_planner(num_blocks: int) -> StepPlanner:
    return StepPlanner("continuous", 64, 2048, BlockAllocator(num_blocks, 16), 4096, lambda: 0.0)


def make_sequence(name: str, num_tokens: int) -> Sequence:
    return Sequence(
        id=name, attempt=1, tenant="t", priority=3, arrival_s=0.0, tokens=[7] * num_tokens,
        num_prompt_tokens=num_tokens, max_tokens=10, sampling=SamplingParams(),
    )  # fmt: skip


def limit_of(memory: DeviceMemory, **changes: int) -> int:
    limit = memory.limit(msgspec.structs.replace(GPU, **changes))
    assert limit is not None
    return limit


def test_the_bound_follows_what_is_left_for_this_process() -> None:
    memory = DeviceMemory(MemoryModel(SHAPE), make_planner(1000))
    alone = limit_of(memory)
    beside_another = limit_of(memory, memory_used_bytes=13_000 * MIB)
    assert alone > beside_another >= 1
    assert limit_of(memory, memory_total_bytes=900 * MIB, memory_used_bytes=900 * MIB, process_memory_bytes=1) == 1


def test_longer_sequences_leave_room_for_fewer() -> None:
    planner = make_planner(1000)
    memory = DeviceMemory(MemoryModel(SHAPE), planner)
    before = limit_of(memory)
    planner.add(make_sequence("long", 2000))
    planner.plan(0.0)
    assert limit_of(memory) < before


def test_what_steps_really_took_is_learned() -> None:
    planner = make_planner(1000)
    planner.add(make_sequence("a", 500))
    planner.plan(0.0)
    modest, hungry = (DeviceMemory(MemoryModel(SHAPE), planner) for _ in range(2))
    for _ in range(50):
        limit_of(modest, process_memory_bytes=3_600 * MIB, memory_used_bytes=3_600 * MIB)
        limit_of(hungry, process_memory_bytes=9_000 * MIB, memory_used_bytes=9_000 * MIB)
    ours = {"memory_used_bytes": 6_000 * MIB, "process_memory_bytes": 6_000 * MIB}
    assert limit_of(hungry, **ours) < limit_of(modest, **ours)


def test_a_cache_that_nobody_uses_is_no_overhead_on_a_host_either() -> None:
    planner = make_planner(5_000)
    planner.add(make_sequence("a", 500))
    planner.plan(0.0)
    model = MemoryModel(SHAPE)
    memory = DeviceMemory(model, planner)
    batch = BatchShape(batch_size=1, tokens_per_sequence=500)
    needed = model.estimate(batch).total
    cache = (5_000 - model.blocks_for(500)) * model.block_bytes  # the rest of it: 7.5 GiB
    for _ in range(50):
        memory.limit(
            msgspec.structs.replace(
                GPU, source="host", process_memory_bytes=needed + cache, memory_used_bytes=needed + cache
            )
        )
    assert abs(model.estimate(batch).total - needed) < 50 * MIB


def test_where_the_driver_does_not_know_this_process_all_that_is_used_counts_as_its_own() -> None:
    planner = make_planner(1_000)
    planner.add(make_sequence("a", 500))
    planner.plan(0.0)
    unknown = msgspec.structs.replace(GPU, process_memory_bytes=None)
    alone, shared = (DeviceMemory(MemoryModel(SHAPE), planner) for _ in range(2))
    for _ in range(50):
        least = shared.limit(msgspec.structs.replace(unknown, memory_used_bytes=13_000 * MIB))
        most = alone.limit(msgspec.structs.replace(unknown, memory_used_bytes=3_600 * MIB))
    assert least is not None
    assert most is not None
    assert 1 <= least < most


def test_where_nothing_is_known_nothing_is_bounded() -> None:
    planner = make_planner(1000)
    assert DeviceMemory(None, planner).limit(GPU) is None
    memory = DeviceMemory(MemoryModel(SHAPE), planner)
    assert memory.limit(None) is None
    assert memory.limit(msgspec.structs.replace(GPU, memory_used_bytes=None)) is None
    assert memory.limit(msgspec.structs.replace(GPU, stale_s=9.0)) is None


def test_the_host_s_memory_bounds_no_batch_of_a_gpu_nor_a_gpu_s_one_of_the_host() -> None:
    host = msgspec.structs.replace(GPU, source="host")
    on_gpu, on_host = (DeviceMemory(MemoryModel(SHAPE), make_planner(1000), on_gpu=on_gpu) for on_gpu in (True, False))
    assert on_gpu.limit(host) is None
    assert on_host.limit(GPU) is None
    assert on_gpu.limit(GPU) is not None
    assert on_host.limit(host) is not None
