"""One HTTP exchange over ASGI: headers in, body within bounds, responses with their request id."""

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from controlplane.api.errors import Headers, error_body, error_headers, status_of
from inference.gateway.errors import ClientGone, GatewayError, InvalidRequest
from inference.logs import current_request

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")
BODY_PATIENCE_S = 30.0
"""How long a client may take to send a body."""
SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(given: bytes | None, token: str) -> bytes:
    """The client's `X-Request-Id` where it is sane, otherwise one of our own."""
    return given if given and SANE_ID.fullmatch(given) else b"req_" + token.encode()


class Exchange:
    """A request being answered. `token` is unique; ids of this request are made from it."""

    __slots__ = (
        "_receive",
        "_send",
        "authorization",
        "content_length",
        "id",
        "idempotency_key",
        "scope",
        "started",
        "token",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, token: str) -> None:
        self.scope = scope
        self.token = token
        self.authorization = b""
        self.content_length: int | None = None
        self.idempotency_key: bytes | None = None
        self.started = False
        self._receive = receive
        self._send = send
        given = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                self.authorization = value
            elif name == b"x-request-id":
                given = value
            elif name == b"idempotency-key":
                self.idempotency_key = value
            elif name == b"content-length":
                self.content_length = int(value) if value.isdigit() else None
        self.id = request_id(given, token)
        current_request.set(self.id.decode())

    async def read_body(self, limit: int) -> bytes | bytearray:
        """The whole body. Raises InvalidRequest where it has over `limit` bytes or takes too long, ClientGone."""
        if self.content_length is not None and self.content_length > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(BODY_PATIENCE_S):
                message = await self._receive()
                if message.get("more_body"):
                    return await self._read_rest(message, limit)
        except TimeoutError:
            raise InvalidRequest("The body did not arrive in time.", code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        return bytes(message.get("body", b""))  # nearly always: it came in one piece

    async def _read_rest(self, message: MutableMapping[str, Any], limit: int) -> bytearray:
        body = bytearray(message.get("body", b""))
        while message.get("more_body"):
            message = await self._receive()
            body += message.get("body", b"")
            if len(body) > limit:
                raise _too_large(limit)
        if message["type"] == "http.disconnect":
            raise ClientGone
        return body

    async def wait_for_disconnect(self) -> None:
        """Return when the client has gone, or the response is complete."""
        message = await self._receive()
        while message["type"] != "http.disconnect":
            message = await self._receive()

    async def respond(self, status: int, body: bytes, headers: Headers = [], kind: tuple[bytes, bytes] = JSON) -> None:  # noqa: B006
        """Send a whole response."""
        await self.start(status, [kind, (b"content-length", b"%d" % len(body)), *headers])
        await self.send(body, more=False)

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers."""
        self.started = True
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [(b"x-request-id", self.id), *headers]}
        )

    async def send(self, body: bytes, *, more: bool) -> None:
        """Send a part of the body. Waits where the client reads slower than it is sent."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def refuse(self, error: GatewayError, headers: Headers = []) -> None:  # noqa: B006
        """Answer with an error."""
        status = status_of(error)
        if status in (408, 413):  # the rest of the body is not read
            headers = [*headers, (b"connection", b"close")]
        await self.respond(status, error_body(error), [*error_headers(error), *headers])


def _too_large(limit: int) -> InvalidRequest:
    return InvalidRequest(f"The body has more than {limit} bytes.", code="request_too_large")
