"""The part of a Celery gpu worker that owns the engine process: a bootstep of the worker, and its control command."""

import logging
import os
import signal
import threading
from abc import ABCMeta, abstractmethod
from types import FrameType
from typing import Any

from celery import bootsteps
from celery.worker.control import control_command

from inference.worker.supervisor import EngineSupervisor, SupervisorOptions

logger = logging.getLogger(__name__)

NODE_PREFIX = "gpu."
"""A worker node named `gpu.REPLICA@host` runs an engine; others do not."""


def replica_of(node: str) -> str | None:
    """The replica of a Celery node name; None for a worker of another kind."""
    name = node.partition("@")[0]
    return name.removeprefix(NODE_PREFIX) if name.startswith(NODE_PREFIX) else None


class AbstractStepType(bootsteps.StepType, ABCMeta):
    """Celery's metaclass of steps, which makes none that lacks a method."""


class EngineStep(bootsteps.StartStopStep, metaclass=AbstractStepType):
    """A step of the worker, not of its consumer: those start anew whenever the broker is lost."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._num_signals = 0
        self._is_drained = False
        self._handlers: dict[int, Any] = {}
        worker.engine = None

    @abstractmethod
    def options(self, replica: str) -> SupervisorOptions:
        """What the engine is started with."""

    def include_if(self, worker: Any) -> bool:
        """Only in gpu workers."""
        return replica_of(worker.hostname) is not None

    def create(self, worker: Any) -> "EngineStep":  # type: ignore[override]
        """Make the supervisor; a gpu worker takes no tasks but those addressed to it."""
        replica = replica_of(worker.hostname)
        assert replica is not None
        worker.app.amqp.queues.select([f"{NODE_PREFIX}{replica}"])
        worker.engine = EngineSupervisor(self.options(replica))
        return self

    def start(self, worker: Any) -> None:
        """Start the engine, and stand before Celery's signal handlers."""
        self._worker = worker
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._on_signal)
        worker.engine.start()

    def stop(self, worker: Any) -> None:
        """The worker ends, by a signal or otherwise."""
        worker.engine.close(0)

    def terminate(self, worker: Any) -> None:
        """The worker ends by force."""
        worker.engine.close(0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Drain first, so that control is answered meanwhile; Celery gets the signal when the engine has ended.

        A second signal, or Ctrl-C, does not wait for what runs: it goes back to the queue.
        """
        if self._is_drained:
            self._handlers[signal.SIGTERM](number, frame)
            return
        self._num_signals += 1
        hurries = self._num_signals > 1 or number == signal.SIGINT
        threading.Thread(target=self._drain, args=(0 if hurries else None,), name="drain", daemon=True).start()

    def _drain(self, drain_s: float | None) -> None:
        logger.info("The engine %s.", "drains" if drain_s is None else "gives back its requests")
        self._worker.engine.close(drain_s)
        self._is_drained = True
        os.kill(os.getpid(), signal.SIGTERM)


@control_command(args=[("command", str)], signature="COMMAND")
def penstock_control(state: Any, command: str, arguments: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
    """Tell the engine to pause, resume, drain, or change mode, batch size, sizing or policy; its acknowledgement."""
    engine: EngineSupervisor | None = getattr(state.consumer.controller, "engine", None)
    if engine is None:
        return {"ok": False, "error": "This worker has no engine."}
    return engine.control(command, arguments or {})
