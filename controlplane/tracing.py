"""A span around each HTTP request, where PENSTOCK_TRACES says where to."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from controlplane.api.openai.exchange import Receive, Scope, Send
from inference.traces import begin_span, end_span, open_tracer

Application = Callable[[Scope, Receive, Send], Awaitable[None]]
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
        # The name has few values: a path may hold ids.
        start = "/".join(scope["path"].split("/")[:4])[:80] if scope["path"].startswith("/v1/") else "dashboard"
        span = begin_span(tracer, f"{scope['method']} {start}", parent, about)
        try:
            await application(scope, receive, send_noted)
        finally:
            end_span(span, status)

    return traced
