"""A span around each HTTP request, where PENSTOCK_TRACES says where to."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from controlplane.api.openai.exchange import Receive, Scope, Send
from inference.traces import begin_span, end_span, open_tracer

Application = Callable[[Scope, Receive, Send], Awaitable[None]]
NAMED = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/files", "/v1/batches", "/api/v1", "/admin")
"""Beginnings of addresses by which spans are called. The rest of an address may hold ids, or anything."""
UNTRACED = ("/healthz", "/readyz", "/metrics", "/static/")


def trace_requests(application: Application, target: str) -> Application:
    """The application as it is, where nothing is traced. Raises TracesUnavailableError."""
    tracer = open_tracer(target)
    if tracer is None:
        return application

    async def traced(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(UNTRACED):
            await application(scope, receive, send)
            return
        status = 500

        async def send_noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        parent = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), "")
        about = {"http.request.method": scope["method"], "url.path": scope["path"][:200]}
        span = begin_span(tracer, f"{scope['method']} {name_of(scope['path'])}", parent, about)
        try:
            await application(scope, receive, send_noted)
        finally:
            end_span(span, status)

    return traced


def name_of(path: str) -> str:
    """What spans of an address are called: one of a few names, whatever clients ask for."""
    unknown = "/v1" if path.startswith("/v1/") else "dashboard"
    return next((start for start in NAMED if path.startswith(start)), unknown)
