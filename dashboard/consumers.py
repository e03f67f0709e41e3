"""The socket of the live page: a snapshot, then numbered updates. It takes no commands; those go through views."""

import asyncio
from importlib import import_module
from typing import Any

from channels.auth import get_user
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.db import DatabaseError

from dashboard.access import VIEW
from dashboard.aggregator import Aggregator, Subscription

CLOSE_SIGNED_OUT = 4401
CLOSE_FORBIDDEN = 4403
ASK_SNAPSHOT = "snapshot"
"""The one thing a page may say: it missed an update."""


class LiveConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """Feeds one page from the process's aggregator for as long as its session lasts."""

    session_check_s = 5.0
    channel_layer_alias = "none"  # the aggregator feeds sockets directly: no Redis connection for each of them

    def __init__(self, *, aggregator: Aggregator) -> None:
        super().__init__()
        self._aggregator = aggregator
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self) -> None:
        """Let in who may see the page; the others are refused before the handshake ends, and learn nothing."""
        if await self._refusal():
            await self.close()
            return
        await self.accept()
        self._subscription = self._aggregator.subscribe()
        self._tasks = [asyncio.create_task(self._feed(self._subscription)), asyncio.create_task(self._watch_session())]

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Take the page's request for a snapshot; ignore all else."""
        if text_data == ASK_SNAPSHOT and self._subscription is not None:
            self._subscription.restart()

    async def disconnect(self, code: int) -> None:
        """The page went away."""
        if self._subscription is not None:
            self._aggregator.unsubscribe(self._subscription)
        for task in self._tasks:
            task.cancel()
        # A send to a socket that has gone fails; that is how it ends, not an error.
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _feed(self, subscription: Subscription) -> None:
        # `send` waits while the client's buffers are full, so that a slow socket holds up only itself.
        while True:
            await self.send(text_data=await subscription.next())

    async def _watch_session(self) -> None:
        while True:
            await asyncio.sleep(self.session_check_s)
            try:
                code = await self._refusal()
            except DatabaseError:  # not the session's fault; the next check decides
                continue
            if code:
                await self.close(code=code)
                return

    async def _refusal(self) -> int:
        """Why this session may not see the page: a close code, or 0. Read anew, since sessions and rights end."""
        session: Any = self.scope.get("session")
        if session is None or session.session_key is None:
            return CLOSE_SIGNED_OUT
        store = import_module(settings.SESSION_ENGINE).SessionStore(session.session_key)
        user = await get_user({"session": store})
        if not user.is_authenticated or not user.is_active:
            return CLOSE_SIGNED_OUT
        return 0 if await user.ahas_perm(VIEW) else CLOSE_FORBIDDEN
