"""An owner's part in the fleet: its lease, and the threads that claim, deliver and renew; begun, and given up again."""

import logging
from collections.abc import Callable

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from inference.worker.active import ActiveRequest
from inference.worker.inbox import Inbox
from inference.worker.intake import Intake
from inference.worker.lease import Heartbeat, Lease
from inference.worker.outbox import Outbox
from inference.worker.spec import EngineSpec
from scheduling import store
from scheduling.core.answers import ClaimedRequest
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


class Membership:
    """Of one process. `read` turns what an owner claimed into an active request."""

    def __init__(self, spec: EngineSpec, inbox: Inbox, read: Callable[[ClaimedRequest, str], ActiveRequest]) -> None:
        keys, model = Keys(spec.key_prefix), spec.deployment.name
        self._queue = queue = FleetQueue(keys, model)
        self.client = connect(spec)
        self.lease = Lease(spec.replica, spec.lease_s)
        self.intake = Intake(connect(spec), queue, keys.bell(model), self.lease, read=read, inbox=inbox)
        self.outbox = Outbox(connect(spec), keys, queue, lease=self.lease, inbox=inbox)
        self._heartbeat = Heartbeat(connect(spec), queue, self.lease, inbox)

    def serve(self, serve: Callable[[], None], suspects: Callable[[], dict[str, int]]) -> None:
        """Run `serve`. However it ends, its last steps are sent and its requests released, where Redis answers.

        Where it fails, those that `suspects` names (by attempt) are suspect, and nobody else: see `may_join`.
        """
        for thread in (self.intake, self.outbox, self._heartbeat):
            thread.start()
        failed = True
        try:
            serve()
            failed = False
        finally:
            self.outbox.close(FAREWELL_S)
            self._release(suspects() if failed else {})
            self._heartbeat.close()

    def _release(self, suspects: dict[str, int]) -> None:
        """Give everything back: what was claimed and not begun, and what an unfinished drain left."""
        self.intake.close()
        commands = [
            self._queue.release(self.lease.owner, suspects, failed=True),
            self._queue.release(self.lease.owner),
        ]
        try:
            num_released = sum(store.execute_many(self.client, commands))
        except redis.RedisError as error:
            logger.warning("Requests could not be given back, their lease will run out: %s", error)
            return
        if num_released:
            logger.info("%d requests went back to the queue.", num_released)
