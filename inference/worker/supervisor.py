"""Keeps one engine process running beside a Celery worker: starts it, starts it again, passes commands, drains it."""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import redis

from inference.messages import DeploymentSpec
from inference.worker.process import EngineGoneError, EngineProcess
from inference.worker.spec import CommandName, EngineSpec
from scheduling import store
from scheduling.keys import Keys

logger = logging.getLogger(__name__)

POLL_S = 1.0
COMPLAINT_PERIOD_S = 15.0
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses before an engine that ended is started again; back to none once one has served for STABLE_S."""
STABLE_S = 30.0
FAREWELL_S = 2.0
"""How long an engine may take to end beyond its drain."""
ANSWER_S = 1.5
REMEMBERED: dict[str, str] = {
    "pause": "gate",
    "resume": "gate",
    "drain": "gate",
    "set_mode": "mode",
    "set_batch_size": "batch size",
    "policy": "policy",
}
"""What an engine that is started again is told anew: the last command of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorOptions:
    """What a gpu worker is told at its start. `model` empty means the newest deployment."""

    command: Sequence[str]
    replica: str
    redis_url: str
    key_prefix: str
    model: str = ""
    device: str = "auto"
    lease_s: float = 5.0
    drain_s: float = 5.0
    log_level: str = "INFO"


class EngineSupervisor(threading.Thread):
    """A thread that lives as long as the worker; the kernel ends an engine process whose starting thread ends."""

    def __init__(self, options: SupervisorOptions) -> None:
        super().__init__(name="engine-supervisor", daemon=True)
        self._options = options
        self._keys = Keys(options.key_prefix)
        self._client = store.connect(options.redis_url, socket_timeout=5, socket_connect_timeout=5)
        self._closing = threading.Event()
        self._process: EngineProcess | None = None
        self._remembered: dict[str, tuple[CommandName, dict[str, Any]]] = {}
        self._complained_s = -COMPLAINT_PERIOD_S

    def run(self) -> None:
        """Start the engine, and again whenever it ends, until closed."""
        num_failures = 0
        while (deployment := self._await_deployment()) is not None:
            started_s = time.monotonic()
            process = self._process = EngineProcess(self._options.command, self._spec(deployment))
            self._attend(process, deployment)
            if self._closing.is_set():
                return
            if process.ready.is_set() and time.monotonic() - started_s > STABLE_S:
                num_failures = 0
            pause_s = BACKOFF_S[min(num_failures, len(BACKOFF_S) - 1)]
            num_failures += 1
            logger.error(
                "The engine process %d ended with status %s; starting it again in %g s.",
                process.pid,
                process.wait(0),
                pause_s,
            )
            self._closing.wait(pause_s)

    def control(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pass a command to the engine and give its acknowledgement; never raises."""
        if command == "stop" or command not in get_args(CommandName):
            return self._ack(ok=False, error=f"There is no command {command!r}.")
        name: CommandName = command  # type: ignore[assignment]
        process = self._process
        if process is None or not process.ready.is_set() or process.ended.is_set():
            self._remembered[REMEMBERED[name]] = (name, arguments)
            return self._ack(ok=True, state="starting")
        try:
            ack = process.send(name, arguments, ANSWER_S)
        except EngineGoneError:
            return self._ack(ok=False, error="The engine process ended; it is being started again.")
        except TimeoutError:
            return self._ack(ok=False, error=f"The engine did not answer within {ANSWER_S} s.")
        if ack.ok:
            self._remembered[REMEMBERED[name]] = (name, arguments)
        return self._ack(ok=ack.ok, error=ack.error, applied_ms=ack.applied_ms, state=ack.state)

    def close(self, drain_s: float | None = None) -> None:
        """Drain the engine for `drain_s` (None: as configured) and wait for its end. May be called again to hurry."""
        self._closing.set()
        process = self._process
        if process is None or process.ended.is_set():
            return
        drain_s = self._options.drain_s if drain_s is None else drain_s
        if process.ready.is_set():
            try:
                process.tell("stop", {"drain_s": drain_s})
            except EngineGoneError:
                return
            if process.wait(drain_s + FAREWELL_S) is not None:
                return
            logger.error("The engine does not end; it is killed, and its requests come back by their lease.")
        process.kill()
        process.wait(FAREWELL_S)

    def _attend(self, process: EngineProcess, deployment: DeploymentSpec) -> None:
        """Until the process ends. One that cannot serve is ended when its deployment changes."""
        told = False
        while process.wait(POLL_S if told else 0.05) is None:
            if process.ready.is_set() and not told:
                told = True
                self._remind(process)
            notice = process.notice
            if notice is not None and notice.state == "failed" and self._find_deployment() not in (None, deployment):
                logger.info("The deployment of %s has changed; trying again.", deployment.name)
                with contextlib.suppress(EngineGoneError):
                    process.tell("stop", {})
                process.wait(FAREWELL_S)

    def _remind(self, process: EngineProcess) -> None:
        for name, arguments in list(self._remembered.values()):
            try:
                process.tell(name, arguments)
            except EngineGoneError:
                return

    def _await_deployment(self) -> DeploymentSpec | None:
        """The deployment to serve, as soon as there is one; None when closed."""
        while not self._closing.is_set():
            deployment = self._find_deployment()
            if deployment is not None:
                return deployment
            self._closing.wait(POLL_S)
        return None

    def _find_deployment(self) -> DeploymentSpec | None:
        model = self._options.model
        try:
            packed = self._client.hgetall(self._keys.deployments)
            found = [msgspec.json.decode(value, type=DeploymentSpec) for value in packed.values()]
        except (redis.RedisError, msgspec.MsgspecError) as error:
            self._complain(f"Waiting for Redis to name a deployment: {error}")
            return None
        eligible = [deployment for deployment in found if model in ("", deployment.name)]
        if not eligible:
            wanted = f"no deployment named {model}" if model else "no deployment"
            self._complain(f"There is {wanted} yet; add one with `manage.py add_model NAME PATH`. Waiting.")
            return None
        return max(eligible, key=lambda deployment: (deployment.created_s, deployment.name))

    def _complain(self, sentence: str) -> None:
        if time.monotonic() - self._complained_s >= COMPLAINT_PERIOD_S:
            self._complained_s = time.monotonic()
            logger.warning("%s", sentence)

    def _spec(self, deployment: DeploymentSpec) -> EngineSpec:
        options = self._options
        return EngineSpec(
            deployment=deployment,
            replica=options.replica,
            redis_url=options.redis_url,
            key_prefix=options.key_prefix,
            device=options.device,
            lease_s=options.lease_s,
            drain_s=options.drain_s,
            log_level=options.log_level,
        )

    def _ack(self, *, ok: bool, error: str = "", applied_ms: float = 0.0, state: str = "") -> dict[str, Any]:
        return {
            "replica": self._options.replica,
            "ok": ok,
            "error": error,
            "applied_ms": round(applied_ms, 3),
            "state": state,
        }
