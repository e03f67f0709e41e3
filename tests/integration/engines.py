"""Starts engine processes for tests, on a small random Llama, and sees to it that none is left."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from inference.messages import BatchMode, DeploymentSpec
from inference.worker.process import EngineProcess
from inference.worker.spec import EngineSpec
from scheduling.keys import Keys
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.patience import PATIENCE_S

COMMAND = [sys.executable, "-m", "inference.worker"]


def make_tiny_checkpoint(path: Path, architecture: str = "llama") -> Path:
    """A Llama with context for 256 (`llama_long`: 4096) tokens, whose texts are noise but always the same."""
    make_checkpoint(architecture, path)
    make_tokenizer("bytes", path)
    return path


class Engines:
    """Engine processes of one test; all are ended with the context."""

    model = "tiny"

    def __init__(self, checkpoint: Path, redis_url: str, keys: Keys) -> None:
        self._checkpoint = checkpoint
        self._redis_url = redis_url
        self._keys = keys
        self.started: list[EngineProcess] = []

    def start(
        self,
        replica: str = "gpu-0",
        mode: BatchMode = "continuous",
        lease_s: float = 60.0,
        path: Path | None = None,
        command: Sequence[str] = COMMAND,
        **fields: Any,
    ) -> EngineProcess:
        """`fields`: of the deployment. No lease ends by itself: a starved process is not a dead one."""
        deployment = DeploymentSpec(
            **{
                "name": self.model,
                "path": str(path or self._checkpoint),
                "mode": mode,
                "max_batch_size": 8,
                "kv_memory_bytes": 4 * 2**20,
                **fields,
            }
        )
        spec = EngineSpec(
            deployment=deployment,
            replica=replica,
            redis_url=self._redis_url,
            key_prefix=self._keys.prefix,
            device="cpu",
            lease_s=lease_s,
            drain_s=PATIENCE_S,
        )
        process = EngineProcess(command, spec)
        self.started.append(process)
        return process

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.started:
            process.kill()
        for process in self.started:
            assert process.wait(PATIENCE_S) is not None
