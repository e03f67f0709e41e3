"""The web process: `/v1/*` goes to a lean application, probes beside it, websockets to Channels, the rest to Django.

Run as `uvicorn controlplane.asgi:application --loop asyncio --http httptools --ws websockets-sansio
--timeout-graceful-shutdown 5 --no-access-log`.
"""

import os
import uuid
from collections.abc import MutableMapping
from typing import Any

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "controlplane.settings")
_django: Any = get_asgi_application()

# What follows imports models, so only now.
from django.conf import settings  # noqa: E402

import controlplane.celery  # noqa: E402, F401  # makes it the current app, by which commands reach gpu workers
from controlplane.api.caller import find_caller  # noqa: E402
from controlplane.api.openai.app import OpenAIApp  # noqa: E402
from controlplane.api.openai.exchange import Exchange, Receive, Scope, Send  # noqa: E402
from controlplane.health import answer_healthz, answer_readyz  # noqa: E402
from controlplane.lifespan import Lifespan  # noqa: E402
from controlplane.metrics import answer_metrics  # noqa: E402
from controlplane.tracing import trace_requests  # noqa: E402
from dashboard.routing import aggregator  # noqa: E402
from dashboard.routing import application as _sockets  # noqa: E402
from inference.gateway.errors import GatewayError  # noqa: E402

_openai = OpenAIApp(settings.PENSTOCK.max_body_bytes)
_lifespan = Lifespan(settings.PENSTOCK, aggregator)
OFFLINE = ("/v1/files", "/v1/batches")
_probes = {"/healthz": answer_healthz, "/readyz": answer_readyz, "/metrics": answer_metrics}


async def _route(scope: Scope, receive: Receive, send: Send) -> None:
    """One ASGI connection."""
    kind = scope["type"]
    if kind == "lifespan":
        await _lifespan(scope, receive, send)
    elif kind == "websocket":
        await _sockets(scope, receive, send)
    elif "/".join(scope["path"].split("/")[:3]) in OFFLINE:
        await _offline(scope, receive, send)
    elif scope["path"].startswith("/v1/") or scope["path"] == "/v1":
        await _openai(scope, receive, send)
    elif (probe := _probes.get(scope["path"])) is not None:
        await probe(scope, receive, send)
    else:
        await _bounded_django(scope, receive, send, settings.PENSTOCK.max_body_bytes)


async def _offline(scope: Scope, receive: Receive, send: Send) -> None:
    """Django too. Files are large and lie in memory until they are whole, so those of strangers are not read."""
    exchange = Exchange(scope, receive, send, uuid.uuid4().hex)
    try:
        find_caller(exchange.authorization, scope["state"]["gateway"].directory)
    except GatewayError as error:
        await exchange.refuse(error)
        return
    uploads = scope["path"] == "/v1/files"
    room = settings.PENSTOCK.max_file_bytes if uploads else 0
    await _bounded_django(scope, receive, send, room + settings.PENSTOCK.max_body_bytes)


async def _bounded_django(scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
    """Django, behind the bound on bodies, and with `X-Request-Id` on its response.

    Django itself takes a body of any size to disk before it asks who sends it.
    """
    exchange = Exchange(scope, receive, send, uuid.uuid4().hex)
    header = (b"x-request-id", exchange.id)
    try:
        bodies = [bytes(await exchange.read_body(max_bytes))]
    except GatewayError as error:
        await exchange.refuse(error)
        return

    async def receive_read() -> MutableMapping[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await receive()

    async def send_with_id(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    await _django(scope, receive_read, send_with_id)


application = trace_requests(_route, settings.PENSTOCK.traces)
"""What uvicorn serves."""
