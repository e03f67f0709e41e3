"""An engine whose device has no memory for a step shrinks it, preempts and tries again; its host has little to do."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import redis
import transformers

from inference.engine.batch import build_batch
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import PartResult
from scheduling.keys import Keys
from tests.integration.engines import Engines, make_tiny_checkpoint
from tests.integration.fleet import FleetClient
from tests.integration.test_engine_parity import generate_alone, make_sequence

COMMAND = [sys.executable, "-m", "tests.integration.cramped_worker"]


@pytest.fixture
def cramped(tmp_path: Path, redis_url: str, keys: Keys) -> Iterator[Engines]:
    with Engines(make_tiny_checkpoint(tmp_path), redis_url, keys) as engines:
        engines.start(command=COMMAND)
        yield engines


@pytest.mark.usefixtures("cramped")
def test_an_engine_that_lacks_memory_shrinks_its_steps_preempts_and_serves_everybody(
    store: redis.Redis, keys: Keys, tmp_path: Path
) -> None:
    fleet = FleetClient(store, keys, Engines.model)
    prompts = [[5 + i] * (30 + i) for i in range(4)]
    for i, prompt in enumerate(prompts):
        fleet.submit(str(i), prompt, 20)
    fleet.until_finished()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for i, prompt in enumerate(prompts):
        assert [*prompt, *fleet.answers[str(i)].token_ids] == generate_alone(model, prompt, 20)
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.output_tokens == 80)
    status = fleet.status("gpu-0")
    assert status is not None
    assert status.preemptions > 0
    assert not status.restarts


def test_planning_and_laying_out_a_step_of_sixteen_is_under_a_twentieth_of_what_100m_parameters_take() -> None:
    allocator = BlockAllocator(800, 16)
    planner = StepPlanner("continuous", 16, 2048, allocator, 600, lambda: 0.0)
    for i in range(16):
        planner.add(make_sequence(str(i), [5] * (90 + i), 400))
    times = []
    for _ in range(200):
        started = time.thread_time()
        parts = planner.plan(0.0)
        build_batch(parts, 16)
        planner.apply(parts, [PartResult(7) for _ in parts])
        times.append(time.thread_time() - started)
    assert median(times) < 0.05 * 0.031  # such a step takes 31 ms, see docs/benchmarks.md
