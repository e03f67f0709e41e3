"""One per web process: reads the fleet when a worker has news, and feeds all sockets, each update serialised once."""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
from django.db import DatabaseError
from redis.exceptions import RedisError

from dashboard.document import DocumentBuilder, history_row
from dashboard.fleet_document import fleet_document
from dashboard.readings import FleetReader
from dashboard.selectors.activity import Activity
from dashboard.state import Document, diff, extend_history

log = logging.getLogger(__name__)

PERIOD_S = 0.25
"""Time between two looks while nobody has news; the queue itself rings no bell here."""
LEAST_S = 0.05
"""Time between two looks at least."""
IDLE_PERIOD_S = 1.0
"""Nobody watches: only the history goes on."""
ROW_PERIOD_S = 1.0
ACTIVITY_PERIOD_S = 1.0
MAX_PENDING = 20
"""Updates a socket may be behind (two seconds) before it is given a snapshot instead."""

encode = msgspec.json.Encoder().encode


class Subscription:
    """What one socket has still to send. Its memory is bounded: who is too slow gets the state afresh."""

    def __init__(self, aggregator: "Aggregator") -> None:
        self._aggregator = aggregator
        self._pending: deque[str] = deque()
        self._wants_snapshot = True
        self._ready = asyncio.Event()
        self._ready.set()

    async def next(self) -> str:
        """The next message to send, as JSON: a snapshot first, then updates without a gap."""
        await self._ready.wait()
        if self._wants_snapshot:
            self._wants_snapshot = False
            self._pending.clear()
            message = self._aggregator.snapshot_message()
        else:
            message = self._pending.popleft()
        if not self._pending:
            self._ready.clear()
        return message

    def put(self, message: str) -> None:
        """Queue an update; called by the aggregator."""
        if not self._wants_snapshot:
            self._pending.append(message)
            if len(self._pending) > MAX_PENDING:
                self.restart()
        self._ready.set()

    def restart(self) -> None:
        """Send a snapshot next: the page missed an update."""
        self._pending.clear()
        self._wants_snapshot = True
        self._ready.set()


class Aggregator:
    """Holds the document and its history, and publishes their changes under consecutive numbers."""

    def __init__(
        self,
        *,
        reader: FleetReader,
        builder: DocumentBuilder,
        read_activity: Callable[[], Awaitable[Activity]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._reader = reader
        self._builder = builder
        self._read_activity = read_activity
        self._clock = clock
        self._epoch = secrets.token_hex(8)
        self._seq = 0
        self._state: Document = {
            "models": {},
            "replicas": {},
            "tenants": [],
            "actions": [],
            "service": {},
            "faults": {},
        }
        self._history: Document = {}
        self._next_row_s = 0.0
        self._activity = Activity()
        self._faults: dict[str, Document] = {}
        self._subscriptions: set[Subscription] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._watched = asyncio.Event()
        self._snapshot: tuple[int, str] | None = None

    def start(self) -> None:
        """Begin to read, unless that goes on already. Needs a running loop."""
        if not self._tasks or any(task.done() for task in self._tasks):
            for task in self._tasks:
                task.cancel()
            self._tasks = [asyncio.create_task(self._read_fleet()), asyncio.create_task(self._follow_activity())]

    async def stop(self) -> None:
        """End the reading tasks."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        await self._reader.close()

    def subscribe(self) -> Subscription:
        """A new socket's feed."""
        self.start()
        subscription = Subscription(self)
        self._subscriptions.add(subscription)
        self._watched.set()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """The socket is gone."""
        self._subscriptions.discard(subscription)
        if not self._subscriptions:
            self._watched.clear()

    def snapshot(self) -> Document:
        """All that a page needs to begin, under the number of the last update it holds."""
        return {"epoch": self._epoch, "seq": self._seq, "state": self._state, "history": self._history}

    def snapshot_message(self) -> str:
        """The snapshot as JSON, serialised once for all sockets that ask between two updates."""
        if self._snapshot is None or self._snapshot[0] != self._seq:
            self._snapshot = (self._seq, encode({"type": "snapshot", **self.snapshot()}).decode())
        return self._snapshot[1]

    async def tick(self) -> None:
        """Read the fleet once and publish what changed."""
        now_s = self._clock()
        state = {**self._state, **self._activity.document(), "time_s": round(now_s, 2)}
        try:
            reading = await self._reader.read(now_s)
            state |= {**self._builder.build(reading), "fleet": fleet_document(reading)}
            self._clear_faults("redis", "dashboard")
        except (RedisError, OSError) as error:
            self._note_fault("redis", "The queue's store does not answer; figures stand as last read.", error)
        except Exception as error:  # a defect must not end the feed of everybody: the log has it, the page says it
            self._note_fault("dashboard", "The server could not make these figures; its log says why.", error)
        state["faults"] = dict(self._faults)
        self._publish(state, self._rows(state, now_s))

    async def refresh_activity(self) -> None:
        """Read the database's part once."""
        try:
            self._activity = await self._read_activity()
            self._clear_faults("database")
        except (DatabaseError, OSError) as error:
            self._note_fault("database", "The database does not answer; recent actions stand as last read.", error)

    def _rows(self, state: Document, now_s: float) -> Document:
        if now_s < self._next_row_s or state["faults"].keys() & {"redis", "dashboard"}:
            return {}
        # On a whole second, however long a tick takes: else rows drift and some seconds have none.
        self._next_row_s = now_s // ROW_PERIOD_S * ROW_PERIOD_S + ROW_PERIOD_S
        return {name: history_row(now_s, model) for name, model in state["models"].items()}

    def _publish(self, state: Document, rows: Document) -> None:
        patch = diff(self._state, state)
        self._seq += 1
        self._state = state
        self._history = extend_history(self._history, rows, state["models"])
        if self._subscriptions:
            update = {"type": "update", "epoch": self._epoch, "seq": self._seq, "patch": patch, "rows": rows}
            message = encode(update).decode()
            for subscription in self._subscriptions:
                subscription.put(message)

    def _note_fault(self, source: str, message: str, error: Exception) -> None:
        if source not in self._faults:
            log.warning("%s", message, exc_info=error)
            self._faults[source] = {"message": message, "since_s": round(self._clock(), 1)}

    def _clear_faults(self, *sources: str) -> None:
        for source in sources:
            self._faults.pop(source, None)

    async def _read_fleet(self) -> None:
        while True:
            began = time.monotonic()
            await self.tick()
            await self._pause(began)

    async def _follow_activity(self) -> None:
        while True:
            await self.refresh_activity()
            await asyncio.sleep(ACTIVITY_PERIOD_S)

    async def _pause(self, began: float) -> None:
        """Until the next tick is due; a first watcher ends the slow pace at once."""
        if self._watched.is_set():
            await asyncio.sleep(max(0.0, LEAST_S - (time.monotonic() - began)))
            await self._reader.await_word(max(0.001, PERIOD_S - (time.monotonic() - began)))
            return
        await self._reader.close()  # words that nobody reads would pile up in Redis, and hold up the first to watch
        with suppress(TimeoutError):
            await asyncio.wait_for(self._watched.wait(), IDLE_PERIOD_S)
