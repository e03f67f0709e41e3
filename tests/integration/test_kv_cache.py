"""Blocks that are swapped out come back as they were, and both caches are sized from memory that is there."""

from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inference.engine import kv_cache
from inference.engine.kv_cache import KVCache, KVShape, size_cache, size_host_cache

SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float32)
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def content(cache: KVCache, block: int) -> list[torch.Tensor]:
    return [tensor[block].cpu().clone() for layer in zip(cache.keys, cache.values, strict=True) for tensor in layer]


@pytest.fixture(params=DEVICES)
def cache(request: pytest.FixtureRequest) -> KVCache:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("There is no CUDA device here.")
    cache = KVCache(SHAPE, 6, torch.device(request.param), num_host_blocks=4)
    for layer in (*cache.keys, *cache.values):
        layer.normal_()
    return cache


def test_blocks_come_back_from_the_host_as_they_were_and_nothing_else_changes(cache: KVCache) -> None:
    before = [content(cache, block) for block in range(6)]
    cache.swap_out([(5, 0), (1, 3)])
    for layer in (*cache.keys, *cache.values):
        layer[[1, 5]] = float("nan")
    cache.swap_in([(0, 2), (3, 5)])
    after = [content(cache, block) for block in range(6)]
    for block, origin in {0: 0, 2: 5, 3: 3, 4: 4, 5: 1}.items():
        assert all(torch.equal(x, y) for x, y in zip(after[block], before[origin], strict=True))
    assert all(x.isnan().all() for x in after[1])


def test_a_host_block_can_be_taken_again_at_once(cache: KVCache) -> None:
    before = [content(cache, block) for block in range(6)]
    cache.swap_out([(0, 1)])
    cache.swap_in([(1, 4)])
    cache.swap_out([(2, 1)])
    cache.swap_in([(1, 5)])
    for block, origin in {4: 0, 5: 2}.items():
        assert all(torch.equal(x, y) for x, y in zip(content(cache, block), before[origin], strict=True))


class Cramped(TorchDispatchMode):
    """A device without memory for the copy that CUDA makes of what does not lie in one piece."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_refused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and not all(tensor.is_contiguous() for tensor in args[:2]):
            self.num_refused += 1
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


def test_blocks_move_without_memory_on_the_device(cache: KVCache) -> None:
    before = content(cache, 5)
    with Cramped() as cramped:
        cache.swap_out([(5, 3)])
        cache.swap_in([(3, 0)])
    assert cramped.num_refused == 2
    assert all(torch.equal(x, y) for x, y in zip(content(cache, 0), before, strict=True))


def test_a_system_that_gives_no_memory_for_host_blocks_has_none(cache: KVCache) -> None:
    cache.set_host_blocks(1 << 50)
    assert cache.num_host_blocks == 0
    with pytest.raises(IndexError, match="cannot be copied"):
        cache.swap_out([(0, 0)])


def test_a_cache_by_free_memory_leaves_room_for_captured_steps_and_one_that_is_asked_for_does_not() -> None:
    def size(**fields: int) -> int:
        given: dict[str, Any] = {"max_batch_size": 1 << 40, "max_model_len": 16, "requested_bytes": 0} | fields
        return size_cache(SHAPE, torch.device("cpu"), **given).num_blocks

    whole = size()
    assert 0.5 * whole < size(graph_bytes=1 << 60) < 0.9 * whole, "a quarter at most"
    assert size(graph_bytes=1 << 60, requested_bytes=9 * SHAPE.block_bytes) == 9


@pytest.mark.parametrize(("device", "host"), [(6, 0), (-1, 0), (0, 4), (0, -1)])
def test_a_block_that_is_not_there_is_refused(cache: KVCache, device: int, host: int) -> None:
    with pytest.raises(IndexError, match="cannot be copied"):
        cache.swap_out([(device, host)])
    with pytest.raises(IndexError, match="cannot be copied"):
        cache.swap_in([(host, device)])


def test_the_host_cache_is_no_larger_than_the_cache_the_free_memory_or_its_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert size_host_cache(SHAPE, 10).num_blocks == 10
    most = size_host_cache(SHAPE, 1 << 40)
    assert most.num_blocks * SHAPE.block_bytes <= kv_cache.MAX_SWAP_BYTES
    assert most.num_blocks * SHAPE.block_bytes < psutil.virtual_memory().total * kv_cache.SWAP_FRACTION
    assert "GiB free host memory" in most.reason
    monkeypatch.setattr(kv_cache, "MAX_SWAP_BYTES", 10 * SHAPE.block_bytes)
    assert size_host_cache(SHAPE, 1 << 40).num_blocks == 10
