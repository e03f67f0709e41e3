"""A request that costs the device each time it runs: it is given up, and what ran beside it ends as it should."""

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from inference.messages import DeploymentSpec
from inference.worker.supervisor import EngineSupervisor, SupervisorOptions
from scheduling.keys import Keys
from tests.integration.engines import Engines, make_tiny_checkpoint
from tests.integration.fleet import FleetClient
from tests.integration.poisoned_worker import POISON
from tests.patience import PATIENCE_S

NUM_INNOCENT = 11


@pytest.fixture
def supervisor(redis_url: str, keys: Keys) -> Iterator[EngineSupervisor]:
    command = [sys.executable, "-m", "tests.integration.poisoned_worker"]
    options = SupervisorOptions(
        command=command, replica="gpu-0", redis_url=redis_url, key_prefix=keys.prefix, device="cpu", lease_s=60.0
    )
    supervisor = EngineSupervisor(options)
    supervisor.start()
    yield supervisor
    supervisor.close(0)
    supervisor.join(PATIENCE_S)


def test_a_poisoned_request_alone_is_given_up(
    supervisor: EngineSupervisor, store: redis.Redis, keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = FleetClient(store, keys, Engines.model)
    fleet.submit("poison", [POISON, 6], 100)
    for i in range(NUM_INNOCENT):
        fleet.submit(f"r{i}", [5 + i, 6], 100)
    checkpoint = make_tiny_checkpoint(tmp_path / "llama")
    spec = DeploymentSpec(name=Engines.model, path=str(checkpoint), max_batch_size=12, kv_memory_bytes=4 * 2**20)
    store.hset(keys.deployments, spec.name, msgspec.json.encode(spec))
    fleet.until_finished()
    codes = {name: answer.finish.error_code for name, answer in fleet.answers.items() if answer.finish}
    assert codes == dict.fromkeys(codes, "") | {"poison": "too_many_attempts"}
    assert all(len(fleet.answers[f"r{i}"].token_ids) == 100 for i in range(NUM_INNOCENT))
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.restarts == {"failed": 3})
    assert caplog.text.count("The device failed and takes no more work") == 3, "its end is said with its reason"
