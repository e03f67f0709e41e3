"""The thread in which requests are with the upstream: an asyncio task for each, whose news the loop takes."""

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

from inference.messages import DeploymentSpec
from inference.upstream.client import UpstreamClient
from inference.upstream.errors import BrokenOff, Failed, Refused, UpstreamError, clean
from inference.upstream.events import Delta
from inference.upstream.forwarded import ForwardedRequest
from inference.worker.inbox import Inbox

logger = logging.getLogger(__name__)

FINISHES = {"stop": "stop", "length": "length", "eos": "stop", "stop_sequence": "stop", "end_turn": "stop"}
"""What servers call an end, and what it is."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A delta of a request's answer, at a moment (monotonic seconds)."""

    active: ForwardedRequest
    delta: Delta
    time_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A request's answer is complete, or there is none."""

    active: ForwardedRequest
    finish: str = ""
    error: UpstreamError | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """The server was asked, beginning at a moment (monotonic seconds), whether it serves."""

    asked_s: float
    error: UpstreamError | None = None


News = Arrived | Ended | Probed


class Streams(threading.Thread):
    """The loop calls `open`, `cut`, `probe` and `take`; the inbox wakes it when there is news."""

    def __init__(self, deployment: DeploymentSpec, key: str, inbox: Inbox) -> None:
        super().__init__(name="streams", daemon=True)
        self._deployment = deployment
        self._model = deployment.upstream_model or deployment.name
        self._key = key
        self._inbox = inbox
        self._news: deque[News] = deque()
        self._tasks: dict[ForwardedRequest, asyncio.Task[None]] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._client: UpstreamClient | None = None

    def run(self) -> None:
        """Until closed."""
        asyncio.set_event_loop(self._loop)
        self._client = UpstreamClient(self._deployment, self._key)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._finish())
            self._loop.close()

    def open(self, active: ForwardedRequest) -> None:
        """Send a request."""
        self._loop.call_soon_threadsafe(self._begin, active)

    def cut(self, active: ForwardedRequest) -> None:
        """Close its connection, whatever is still to come; the upstream notices that."""
        self._loop.call_soon_threadsafe(self._cancel, active)

    def probe(self, *, lists_model: bool) -> None:
        """Ask whether the server serves."""
        self._loop.call_soon_threadsafe(self._begin_probe, lists_model)

    def take(self) -> list[News]:
        """What has happened since the last call, in order."""
        news = []
        while self._news:
            news.append(self._news.popleft())
        return news

    def close(self) -> None:
        """Cut all, and end."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()

    def _begin(self, active: ForwardedRequest) -> None:
        task = self._loop.create_task(self._answer(active))
        self._tasks[active] = task
        task.add_done_callback(lambda _: self._tasks.pop(active, None))

    def _cancel(self, active: ForwardedRequest) -> None:
        if (task := self._tasks.get(active)) is not None:
            task.cancel()

    def _begin_probe(self, lists_model: bool) -> None:
        task = self._loop.create_task(self._probe(lists_model))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _answer(self, active: ForwardedRequest) -> None:
        finish, error = "", None

        def take(delta: Delta) -> None:
            nonlocal finish
            finish = delta.finish or finish
            if delta.is_token or delta.usage:
                self._tell(Arrived(active, delta, time.monotonic()))

        assert self._client is not None
        try:
            await self._client.answer(active.request.endpoint, active.body(self._model), take)
        except UpstreamError as found:
            error = None if finish else found  # it is complete; only the count of its tokens is missing
        except Exception:
            logger.exception("Request %s cannot be forwarded", active.request.id)
            error = Failed("The request could not be forwarded.")
        if error is None and not finish:
            error = BrokenOff("The upstream broke off within its answer.")
        if error is None and finish not in FINISHES:
            error = Refused(f"The upstream ended its answer early: {clean(finish)}.", "upstream_ended")
        self._tell(Ended(active, FINISHES.get(finish, ""), error))

    async def _probe(self, lists_model: bool) -> None:
        assert self._client is not None
        asked_s, error = time.monotonic(), None
        try:
            await self._client.probe(lists_model=lists_model)
        except UpstreamError as found:
            error = found
        except Exception:
            logger.exception("The upstream cannot be probed")
            error = Failed("The upstream could not be probed.")
        self._tell(Probed(asked_s, error))

    def _tell(self, news: News) -> None:
        self._news.append(news)
        self._inbox.wake()

    async def _finish(self) -> None:
        tasks = [*self._tasks.values(), *self._probes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
