"""An engine: the loop with its threads, put together, run, and taken apart."""

import logging
import time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from inference.tokenization import TextStream, Tokenizer
from inference.worker.active import ActiveRequest, open_request
from inference.worker.commands import Controls
from inference.worker.gate import Gate
from inference.worker.inbox import Inbox
from inference.worker.intake import Intake
from inference.worker.lease import Heartbeat, Lease
from inference.worker.loop import EngineLoop, Runner
from inference.worker.meters import Meters, Second
from inference.worker.outbox import Outbox
from inference.worker.pipe import Pipe
from inference.worker.reporter import Reporter
from inference.worker.spec import EngineSpec
from inference.worker.status import StatusBoard, first_status
from scheduling import store
from scheduling.core.answers import ClaimedRequest
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
"""A Redis that is silent for this long counts as lost."""
FAREWELL_S = 1.0
"""How long the last steps may take to reach Redis at the end; what does not is computed again elsewhere."""


def connect(spec: EngineSpec) -> redis.Redis:
    """A client that reports a lost connection at once: each thread has its own way to go on."""
    return store.connect(
        spec.redis_url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
    )


class Engine:
    """Serves one deployment until its gate says that it is over."""

    def __init__(
        self,
        spec: EngineSpec,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        pipe: Pipe,
        inbox: Inbox,
        reporter: Reporter,
        detail: str = "",
    ) -> None:
        keys = Keys(spec.key_prefix)
        model = spec.deployment.name
        self._model = model
        self._tokenizer = tokenizer
        self._queue = FleetQueue(keys, model)
        self._lease = Lease(spec.replica, spec.lease_s)
        self._reporter = reporter
        self._client = connect(spec)
        planner = _build_planner(spec, runner)
        meters = Meters(Second(started_s=time.time()))
        gate = Gate(time.monotonic)
        self._intake = Intake(
            connect(spec), self._queue, keys.bell(model), self._lease, read=self._read_claimed, inbox=inbox
        )
        self._outbox = Outbox(connect(spec), keys, self._queue, lease=self._lease, inbox=inbox)
        self._heartbeat = Heartbeat(connect(spec), self._queue, self._lease, inbox)
        board = StatusBoard(first_status(spec), detail, planner=planner, meters=meters, gate=gate, intake=self._intake)
        self.loop = EngineLoop(
            planner=planner,
            runner=runner,
            lease=self._lease,
            intake=self._intake,
            outbox=self._outbox,
            reporter=reporter,
            inbox=inbox,
            pipe=pipe,
            gate=gate,
            controls=Controls(gate, planner, board.announce, spec.drain_s),
            board=board,
            meters=meters,
        )

    def run(self) -> None:
        """Serve. However the loop ends, its last steps are sent and its requests released, where Redis answers."""
        threads = (self._intake, self._outbox, self._heartbeat)
        for thread in threads:
            thread.start()
        failed = True
        try:
            self.loop.run()
            failed = False
        finally:
            self._outbox.close(FAREWELL_S)
            self._release(failed)
            self._heartbeat.close()

    def _release(self, failed: bool) -> None:
        """Give everything back: what was claimed and not begun, and what an unfinished drain left."""
        self._intake.close()
        try:
            num_released = store.execute(self._client, self._queue.release(self._lease.owner, failed=failed))
        except redis.RedisError as error:
            logger.warning("Requests could not be given back, their lease will run out: %s", error)
            return
        if num_released:
            logger.info("%d requests went back to the queue.", num_released)

    def _read_claimed(self, claimed: ClaimedRequest, owner: str) -> ActiveRequest:
        return open_request(
            claimed,
            owner=owner,
            model=self._model,
            new_stream=lambda sampling: TextStream.of(self._tokenizer, sampling),
            now_s=time.time(),
        )


def _build_planner(spec: EngineSpec, runner: Runner) -> StepPlanner:
    deployment = spec.deployment
    return StepPlanner(
        deployment.mode,
        deployment.max_batch_size,
        deployment.step_tokens,
        BlockAllocator(runner.num_blocks, runner.block_size),
        runner.max_model_len,
        time.monotonic,
        eos_token_ids=runner.eos_token_ids,
    )
