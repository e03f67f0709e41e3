"""Tells Redis ten times a second what this engine process is doing, and what each second of it was."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import redis

from inference.messages import HISTORY_LENGTH, BatchEvent, ReplicaStatus, Telemetry
from scheduling.keys import Keys

logger = logging.getLogger(__name__)

PERIOD_S = 0.1
"""How often a status is made at least; it is sent at once."""
NEWS_PERIOD_S = 0.05
"""How often at most, while requests come and go: so a page shows an event well within 300 ms, for 1 % of a step."""
STATUS_KEEP_MS = 2000
"""A status outlives hiccups of a few periods; then the replica counts as silent."""
MAX_WAITING_EVENTS = 600
"""Seconds that are kept for later while Redis is away; older ones are lost."""

_encode = msgspec.msgpack.Encoder().encode


class Reporter(threading.Thread):
    """A thread that sends the latest status and what events there are. The loop only leaves them here."""

    def __init__(
        self, client: redis.Redis, keys: Keys, status: ReplicaStatus, telemetry: Callable[[], Telemetry | None]
    ) -> None:
        super().__init__(name="reporter", daemon=True)
        self._client = client
        self._keys = keys
        self._status = status
        self._telemetry = telemetry
        self._events: deque[BatchEvent] = deque(maxlen=MAX_WAITING_EVENTS)
        self._closing = threading.Event()
        self._fresh = threading.Event()
        self._is_away = False

    def read_telemetry(self) -> Telemetry | None:
        """The latest reading."""
        return self._telemetry()

    def publish(self, status: ReplicaStatus) -> None:
        """Show this from now on."""
        self._status = status
        self._fresh.set()

    def record(self, event: BatchEvent) -> None:
        """Send one second's record with the next status."""
        self._events.append(msgspec.structs.replace(event, telemetry=self._telemetry()))

    def run(self) -> None:
        """Report until closed."""
        while not self._closing.is_set():
            self._fresh.wait(PERIOD_S)
            self._fresh.clear()
            self.send()

    def close(self) -> None:
        """Send the last status, and end."""
        self._closing.set()
        self._fresh.set()
        self.join()
        self.send()

    def send(self) -> None:
        """One report. Events that cannot be sent wait for the next one."""
        events = list(self._events)
        now = time.time()
        status = msgspec.structs.replace(self._status, time_s=now, telemetry=self._telemetry())
        try:
            with self._client.pipeline(transaction=False) as pipe:
                pipe.set(self._keys.replica(status.replica), _encode(status), px=STATUS_KEEP_MS)
                pipe.zadd(self._keys.replicas, {status.replica: now})
                if events:
                    pipe.xadd(self._keys.history, {"m": _encode(events)}, maxlen=HISTORY_LENGTH, approximate=True)
                pipe.publish(self._keys.told, status.replica)
                pipe.execute()
        except redis.RedisError as error:
            if not self._is_away:
                logger.warning("The status cannot be reported: %s", error)
            self._is_away = True
            return
        self._is_away = False
        for _ in events:
            self._events.popleft()
