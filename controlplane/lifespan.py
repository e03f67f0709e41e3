"""What starts and stops with a web process: the directory, the gateway, the dashboard's aggregator."""

import asyncio
import gc
import logging
import signal
import threading
from collections.abc import MutableMapping
from typing import Any

import redis.asyncio

from controlplane.api.openai.exchange import Receive, Send
from controlplane.config import Config
from dashboard.aggregator import Aggregator
from inference.directory import DirectoryWatch
from inference.gateway.gateway import Gateway
from scheduling.keys import Keys

log = logging.getLogger(__name__)
STREAMS_GRACE_S = 3.5
"""How long answers in flight may go on after SIGTERM. Shorter than the server's own patience of 5 s, so that what is
cut off gets an error frame."""


class Lifespan:
    """ASGI's lifespan protocol."""

    def __init__(self, config: Config, aggregator: Aggregator) -> None:
        self._config = config
        self._aggregator = aggregator

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Start, wait for the end, stop."""
        await receive()
        keys = Keys(prefix=self._config.key_prefix)
        async with redis.asyncio.Redis.from_url(self._config.redis, socket_timeout=5.0) as client:
            directory = DirectoryWatch(client, keys)
            gateway = Gateway(
                self._config.redis,
                keys,
                directory,
                queue_limit=self._config.queue_limit,
                queue_tokens=self._config.queue_tokens or None,
                idempotency_keep_s=self._config.idempotency_keep_s,
                no_replica_s=self._config.no_replica_s,
            )
            try:
                await directory.start()
                await gateway.start()
                self._aggregator.start()
            except Exception as error:
                log.exception("The web process cannot start")
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            scope["state"].update(gateway=gateway, directory=directory)
            _end_replies_on_sigterm(gateway)
            gc.collect()
            gc.freeze()  # what is there now stays; to look for garbage in it would hold up every request now and then
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._aggregator.stop()
            await gateway.stop()
            await directory.stop()
        await send({"type": "lifespan.shutdown.complete"})


def _end_replies_on_sigterm(gateway: Gateway) -> None:
    """Hear of the end as early as the server does.

    The server first waits for open responses and only then runs our shutdown, so long streams would be cut off without
    a word. Its own handler stays in charge; ours goes before it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()

    def begin() -> None:
        gateway.begin_shutdown()
        loop.call_later(STREAMS_GRACE_S, gateway.end_replies)

    for number in (signal.SIGTERM, signal.SIGINT):
        served = signal.getsignal(number)

        def handle(sig: int, frame: Any, served: Any = served) -> None:
            loop.call_soon_threadsafe(begin)
            if callable(served):
                served(sig, frame)

        signal.signal(number, handle)
