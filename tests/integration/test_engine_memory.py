"""An engine whose device has no memory for a step shrinks it, preempts and tries again; its host has little to do."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import msgspec
import pytest
import redis
import transformers

from inference.engine.batch import build_batch
from inference.messages import DeploymentSpec
from inference.worker.supervisor import EngineSupervisor, SupervisorOptions
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import PartResult
from scheduling.keys import Keys
from tests.integration.cramped_worker import GREEDY
from tests.integration.engines import Engines, make_tiny_checkpoint
from tests.integration.fleet import FleetClient
from tests.integration.test_engine_parity import generate_alone, make_sequence
from tests.patience import PATIENCE_S

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


@pytest.mark.usefixtures("cramped")
def test_a_request_for_which_there_is_no_memory_alone_fails_once_others_got_on(store: redis.Redis, keys: Keys) -> None:
    fleet = FleetClient(store, keys, Engines.model)
    fleet.submit("greedy", [GREEDY, 6], 20)
    for i in range(3):
        fleet.submit(str(i), [5 + i] * 30, 20)
    fleet.until_finished()
    codes = {name: answer.finish.error_code for name, answer in fleet.answers.items() if answer.finish}
    assert codes == {"greedy": "engine_error", "0": "", "1": "", "2": ""}
    assert all(len(fleet.answers[str(i)].token_ids) == 20 for i in range(3))
    status = fleet.status("gpu-0")
    assert status is not None
    assert not status.restarts


@pytest.fixture
def supervisor(redis_url: str, keys: Keys, tmp_path: Path) -> Iterator[EngineSupervisor]:
    options = SupervisorOptions(
        command=[*COMMAND, str(tmp_path / "starved")],
        replica="gpu-0",
        redis_url=redis_url,
        key_prefix=keys.prefix,
        device="cpu",
        lease_s=60.0,
    )
    supervisor = EngineSupervisor(options)
    supervisor.start()
    yield supervisor
    supervisor.close(0)
    supervisor.join(PATIENCE_S)


@pytest.mark.usefixtures("supervisor")
def test_where_memory_is_gone_requests_go_back_to_the_queue_and_the_engine_is_started_again(
    store: redis.Redis, keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = FleetClient(store, keys, Engines.model)
    for i in range(6):
        fleet.submit(str(i), [5 + i] * (10 + i), 20)
    checkpoint = make_tiny_checkpoint(tmp_path / "llama")
    spec = DeploymentSpec(name=Engines.model, path=str(checkpoint), max_batch_size=4, kv_memory_bytes=4 * 2**20)
    store.hset(keys.deployments, spec.name, msgspec.json.encode(spec))
    fleet.until_finished()
    assert {answer.finish.reason for answer in fleet.answers.values() if answer.finish} == {"length"}
    assert all(len(answer.token_ids) == 20 for answer in fleet.answers.values())
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.restarts == {"failed": 1})
    assert "ended with status 1: The device has no memory left" in caplog.text


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
