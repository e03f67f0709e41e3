"""The lease under which an engine process holds requests, and the thread that renews it."""

import logging
import threading
import time

import redis

from inference.worker.inbox import Inbox, LeaseLost
from scheduling import store
from scheduling.fleet import FleetQueue

logger = logging.getLogger(__name__)


class Lease:
    """Whose requests these are: `replica:start-time`. A lost lease is followed by a new owner, who holds nothing."""

    def __init__(self, replica: str, lease_s: float) -> None:
        self.replica = replica
        self.lease_s = lease_s
        self.owner = self._name()
        self._claimed_as = ""

    def replace(self) -> None:
        """Go on as a new owner."""
        self.owner = self._name()

    def note_claim(self, owner: str) -> None:
        """From now on the owner has a lease in Redis; before its first claim there is none to lose."""
        self._claimed_as = owner

    @property
    def is_held(self) -> bool:
        """Whether there should be a lease in Redis."""
        return self._claimed_as == self.owner

    def _name(self) -> str:
        return f"{self.replica}:{time.time_ns()}"


class Heartbeat(threading.Thread):
    """Renews the lease every quarter of its length, apart from the loop, so that a long step does not cost it."""

    def __init__(self, client: redis.Redis, queue: FleetQueue, lease: Lease, inbox: Inbox) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._client = client
        self._queue = queue
        self._lease = lease
        self._inbox = inbox
        self._closing = threading.Event()
        self._reported = ""

    def run(self) -> None:
        """Beat until closed."""
        while not self._closing.wait(self._lease.lease_s / 4):
            owner = self._lease.owner
            if not self._lease.is_held:
                continue
            try:
                held = store.execute(self._client, self._queue.renew(owner, self._lease.lease_s))
            except redis.RedisError as error:
                logger.warning("The lease of %s could not be renewed: %s", owner, error)
                continue
            if not held and owner != self._reported:
                self._reported = owner
                self._inbox.put(LeaseLost(owner))

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self.join()
