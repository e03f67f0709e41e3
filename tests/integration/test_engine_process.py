"""The engine process: requests in by the queue, answers out by the reply stream, through kill, cancel and control."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from inference.messages import BatchMode, DeploymentSpec
from inference.worker.process import EngineProcess
from inference.worker.spec import EngineSpec
from scheduling.keys import Keys
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.integration.fleet import FleetClient

COMMAND = [sys.executable, "-m", "inference.worker"]
MODEL = "tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path)
    make_tokenizer("bytes", path)
    return path


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys) -> FleetClient:
    return FleetClient(store, keys, MODEL)


class Engines:
    """Starts engine processes for one test."""

    def __init__(self, checkpoint: Path, redis_url: str, keys: Keys) -> None:
        self._checkpoint = checkpoint
        self._redis_url = redis_url
        self._keys = keys
        self.started: list[EngineProcess] = []

    def start(self, replica: str = "gpu-0", mode: BatchMode = "continuous", lease_s: float = 2.0) -> EngineProcess:
        deployment = DeploymentSpec(
            name=MODEL, path=str(self._checkpoint), mode=mode, max_batch_size=8, kv_memory_bytes=4 * 2**20
        )
        spec = EngineSpec(
            deployment=deployment,
            replica=replica,
            redis_url=self._redis_url,
            key_prefix=self._keys.prefix,
            device="cpu",
            lease_s=lease_s,
        )
        process = EngineProcess(COMMAND, spec)
        self.started.append(process)
        return process


@pytest.fixture
def engines(checkpoint: Path, redis_url: str, keys: Keys) -> Iterator[Engines]:
    engines = Engines(checkpoint, redis_url, keys)
    yield engines
    for process in engines.started:
        process.kill()
        assert process.wait(10) is not None


def test_requests_of_a_batch_are_answered_with_numbered_tokens_and_recorded(
    engines: Engines, fleet: FleetClient
) -> None:
    engines.start()
    for i in range(20):
        fleet.submit(f"r{i}", [5 + i, 6, 7], 10 + i)
    fleet.until_finished()
    for i in range(20):
        answer = fleet.answers[f"r{i}"]
        assert len(answer.token_ids) == 10 + i
        assert answer.finish is not None
        assert (answer.finish.reason, answer.finish.prompt_tokens) == ("length", 3)
