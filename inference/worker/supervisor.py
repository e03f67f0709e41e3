"""Keeps one engine process running beside a Celery worker: starts it, again when it ends or hangs, commands, drains."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import redis

from inference.logs import LogFormat
from inference.messages import DeploymentSpec
from inference.worker.orders import Orders
from inference.worker.process import EngineGoneError, EngineProcess
from inference.worker.reporter import STATUS_KEEP_MS
from inference.worker.rollout import judge_change, overridden
from inference.worker.spec import LOST_STATUS, CommandName, EngineSpec, find_sizing_problem
from inference.worker.status import first_status
from scheduling import store
from scheduling.fleet import FleetQueue
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
LAST_WORDS_S = 1.0
"""How long what a process sent before its end may take to reach Redis; then others have its requests."""
REMEMBERED: dict[str, str] = {
    "pause": "gate",
    "resume": "gate",
    "drain": "gate",
    "set_mode": "mode",
    "set_batch_size": "batch size",
    "sizing": "batch size",
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
    log_format: LogFormat = "line"
    gpu: str = ""
    step_timeout_s: float = 120.0
    """An engine that ends no step, idle turns included, for this long is killed."""
    load_timeout_s: float = 1800.0
    """The same while it loads its model."""
    upstream_command: Sequence[str] = ()
    """What takes the place of `command` for a deployment that another server computes."""


class EngineSupervisor(threading.Thread):
    """A thread that lives as long as the worker; the kernel ends an engine process whose starting thread ends."""

    def __init__(self, options: SupervisorOptions) -> None:
        super().__init__(name="engine-supervisor", daemon=True)
        self._options = options
        self._keys = Keys(options.key_prefix)
        self._client = store.connect(options.redis_url, socket_timeout=5, socket_connect_timeout=5)
        self._orders = Orders(self._client, self._keys, options.replica)
        self._closing = threading.Event()
        self._process: EngineProcess | None = None
        self._remembered: dict[str, tuple[CommandName, dict[str, Any]]] = {}
        self._gpu = ""
        """UUID of the GPU that an engine served on; its successors wait for it rather than take another device."""
        self._restarts: dict[str, int] = {}
        self._replaced_by_s: float | None = None
        """Until when (monotonic) the engine may take to make place for one with the changed deployment."""
        self._complained_s = -COMPLAINT_PERIOD_S

    def run(self) -> None:
        """Start the engine, and again whenever it ends, until closed."""
        num_failures = 0
        while (deployment := self._await_deployment()) is not None:
            started_s = time.monotonic()
            self._replaced_by_s = None
            self._obey_orders(None)
            spec = self._spec(deployment)
            try:
                process = self._process = EngineProcess(self._command(deployment), spec)
            except OSError as error:  # no memory for it, no more processes
                num_failures, pause_s = self._count_failure(num_failures)
                self._rest(spec, pause_s, f"The engine process cannot be started: {error}. Next try in {pause_s:g} s.")
                continue
            hung = self._attend(process, spec)
            self._end_lease(process.owner, deployment)
            if self._closing.is_set():
                return
            if self._replaced_by_s is not None and not hung:
                continue
            if process.ready.is_set() and time.monotonic() - started_s > STABLE_S:
                num_failures = 0
            num_failures, pause_s = self._count_failure(num_failures)
            status = process.wait(0)
            reason = "hung" if hung else "lost" if status == LOST_STATUS else "failed"
            self._restarts[reason] = self._restarts.get(reason, 0) + 1
            self._rest(
                spec, pause_s, f"{hung or self._describe_end(process, status)} It is started again in {pause_s:g} s."
            )

    def _end_lease(self, owner: str, deployment: DeploymentSpec) -> None:
        """Nobody has to wait for the lease of a process that has ended."""
        if not owner:
            return
        try:
            store.execute(self._client, FleetQueue(self._keys, deployment.name).end_lease(owner, LAST_WORDS_S))
        except redis.RedisError as error:
            self._complain(f"The requests of {owner} come back when its lease has run out: {error}")

    def _command(self, deployment: DeploymentSpec) -> Sequence[str]:
        return self._options.upstream_command if deployment.is_upstream else self._options.command

    @staticmethod
    def _count_failure(num_failures: int) -> tuple[int, float]:
        """The number with one more, and the pause before the next start."""
        return num_failures + 1, BACKOFF_S[min(num_failures, len(BACKOFF_S) - 1)]

    def _rest(self, spec: EngineSpec, pause_s: float, sentence: str) -> None:
        """Say why nothing runs, and wait before the next start."""
        logger.error("%s", sentence)
        end_s = time.monotonic() + pause_s
        while not self._closing.is_set():
            self._report(spec, sentence)
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return
            self._closing.wait(min(left_s, POLL_S))

    def _report(self, spec: EngineSpec, detail: str) -> None:
        """A status in place of the engine's own, which says nothing now."""
        status = msgspec.structs.replace(
            first_status(spec), state="failed", detail=detail, restarts=dict(self._restarts)
        )
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.set(self._keys.replica(spec.replica), msgspec.msgpack.encode(status), px=STATUS_KEEP_MS)
                pipe.zadd(self._keys.replicas, {spec.replica: status.time_s})
                pipe.execute()
        except redis.RedisError as error:
            self._complain(f"The status cannot be reported: {error}")

    def control(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pass a command to the engine and give its acknowledgement; never raises."""
        if command not in REMEMBERED:
            return self._ack(ok=False, error=f"There is no command {command!r}.")
        name: CommandName = command  # type: ignore[assignment]
        process = self._process
        if process is None or not process.ready.is_set() or process.ended.is_set():
            if name == "sizing" and (problem := find_sizing_problem(arguments)):
                return self._ack(ok=False, error=problem)
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
        drain_s = self._orders.drain_s(self._options.drain_s) if drain_s is None else drain_s
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

    def _attend(self, process: EngineProcess, spec: EngineSpec) -> str:
        """Until the process ends; a sentence where it hung and was killed."""
        told, num_silent, hung, deployment = False, 0, "", spec.deployment
        while process.wait(POLL_S if told else 0.05) is None:
            if process.ready.is_set() and not told:
                told = True
                self._remind(process)
            # Twice: what the engine said while this process itself was stopped is read in the meantime.
            num_silent = num_silent + 1 if self._is_silent(process) else 0
            if num_silent > 1:
                hung = hung or self._describe_hang(process)
                self._report(spec, hung)
                process.kill()
            deployment = self._follow(process, deployment)
            self._obey_orders(process)  # after the deployment: the plan is published before what takes back its orders
        return hung

    def _obey_orders(self, process: EngineProcess | None) -> None:
        """Tell the engine what operators want and it was not told; one that loads hears it once it is ready."""
        planned = self._orders.read()
        for kind, told in (planned.commands if planned else {}).items():
            if self._remembered.get(kind) == told or REMEMBERED.get(told[0]) != kind:
                continue
            command: CommandName = told[0]  # type: ignore[assignment]  # one of REMEMBERED
            self._remembered[kind] = (command, told[1])
            if process is not None and process.ready.is_set():
                try:
                    process.tell(command, told[1])
                except EngineGoneError:
                    return

    def _follow(self, process: EngineProcess, before: DeploymentSpec) -> DeploymentSpec:
        """Let the engine take up a changed deployment, by a drain and a new process where it must; what it serves now.

        One that cannot serve, or still loads what is no more wanted, ends at once. What one that loads can take up, it
        is told when it serves.
        """
        if self._replaced_by_s is not None:
            if time.monotonic() > self._replaced_by_s:
                logger.error("The engine does not end; it is killed, and its requests come back by their lease.")
                process.kill()
            return before
        after = self._look_up(before.name)
        if after is None or (change := judge_change(before, after)) == "none":
            return before
        has_failed = process.notice is not None and process.notice.state == "failed"
        is_serving = process.ready.is_set() and not has_failed
        if change == "live" and not is_serving and not has_failed:
            return before
        for kind in overridden(before, after):
            self._remembered.pop(kind, None)
        try:
            if change == "live" and is_serving:
                logger.info("The deployment of %s has changed; the engine takes it up.", before.name)
                process.tell("deployment", msgspec.to_builtins(after))
                return after
            logger.info("The deployment of %s has changed; a new engine process takes over.", before.name)
            drain_s = self._options.drain_s if is_serving else 0.0
            bound_s = drain_s + FAREWELL_S if process.ready.is_set() else self._options.load_timeout_s
            self._replaced_by_s = time.monotonic() + bound_s
            process.tell("stop", {"drain_s": drain_s})
        except EngineGoneError:
            logger.info("The engine process ended before it heard of it.")
        return before

    def _look_up(self, name: str) -> DeploymentSpec | None:
        """A deployment as it stands now; None while that is unknown, or it is offered no more."""
        try:
            packed: Any = self._client.hget(self._keys.deployments, name)
            return None if packed is None else msgspec.json.decode(packed, type=DeploymentSpec)
        except (redis.RedisError, msgspec.MsgspecError) as error:
            self._complain(f"The deployment of {name} cannot be read: {error}")
            return None

    def _is_silent(self, process: EngineProcess) -> bool:
        """The watchdog: whether a step, or the load of the model, has taken longer than it may."""
        if process.notice is not None and process.notice.state == "failed":  # it waits, and ends by itself
            return False
        return time.monotonic() - process.heard_s > self._bound_s(process)

    def _bound_s(self, process: EngineProcess) -> float:
        return self._options.step_timeout_s if process.ready.is_set() else self._options.load_timeout_s

    def _describe_hang(self, process: EngineProcess) -> str:
        what = "has ended no step" if process.ready.is_set() else "has not loaded its model"
        sentence = f"The engine process {process.pid} {what} for {self._bound_s(process):g} s and is killed."
        logger.error("%s Its requests go on elsewhere, or when it has started again.", sentence)
        return sentence

    @staticmethod
    def _describe_end(process: EngineProcess, status: int | None) -> str:
        notice = process.notice
        why = f": {notice.detail}" if notice is not None and notice.state == "failed" else "."
        return f"The engine process {process.pid} ended with status {status}{why}"

    def _remind(self, process: EngineProcess) -> None:
        """Tell a new engine what its predecessor was told; remember where it runs."""
        if process.notice is not None and process.notice.gpu:
            self._gpu = process.notice.gpu
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
        device = "cuda" if self._gpu and options.device == "auto" else options.device
        return EngineSpec(
            deployment=deployment,
            replica=options.replica,
            redis_url=options.redis_url,
            key_prefix=options.key_prefix,
            device=device,
            lease_s=options.lease_s,
            drain_s=options.drain_s,
            log_level=options.log_level,
            log_format=options.log_format,
            gpu=options.gpu or self._gpu,
            restarts=dict(self._restarts),
        )

    def _ack(self, *, ok: bool, error: str = "", applied_ms: float = 0.0, state: str = "") -> dict[str, Any]:
        return {
            "replica": self._options.replica,
            "ok": ok,
            "error": error,
            "applied_ms": round(applied_ms, 3),
            "state": state,
        }
