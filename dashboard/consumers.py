"""The socket of the live page."""

from typing import Any

from channels.generic.websocket import AsyncWebsocketConsumer


class LiveConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """Sends state first, then numbered updates."""

    async def connect(self) -> None:
        """Let signed-in users in; refuse the others before the handshake ends."""
        user: Any = self.scope.get("user")
        if user is None or not user.is_authenticated:
            await self.close()
            return
        await self.accept()
