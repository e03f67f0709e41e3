"""OpenTelemetry traces: a span for each request at the web process, and its times in queue and engine from history.

The packages are optional (`deploy/requirements-traces.txt`) and looked for only where traces are wanted. What happened
in an engine is told by the historian, once and afterwards, so that tracing costs a step nothing.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.messages import RequestEvent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Span, Tracer

current_traceparent: ContextVar[str] = ContextVar("current_traceparent", default="")
"""W3C trace context of the request that is being served; empty where nothing is traced."""

EXPORT_PERIOD_MS = 1000
PHASES = (
    ("queue", "arrival_s", "claimed_s"),
    ("prefill", "claimed_s", "first_token_s"),
    ("decode", "first_token_s", "finished_s"),
)
"""Spans of a request below the web process's, by the times of its event."""


class TracesUnavailableError(Exception):
    """PENSTOCK_TRACES needs packages that are missing: pip install -r deploy/requirements-traces.txt."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)


@cache
def open_tracer(target: str) -> "Tracer | None":
    """This process's tracer to an OTLP/HTTP endpoint or a file; None where `target` is empty.

    Raises TracesUnavailableError.
    """
    if not target:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracesUnavailableError from None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "penstock")})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_exporter(target), schedule_delay_millis=EXPORT_PERIOD_MS))
    return provider.get_tracer("penstock")


def _exporter(target: str) -> Any:
    if target.startswith("/"):
        return FileExporter(Path(target))
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise TracesUnavailableError from None
    return OTLPSpanExporter(endpoint=target)


class FileExporter:
    """A SpanExporter that appends spans to a file, one JSON object a line; several processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def export(self, spans: "Sequence[ReadableSpan]") -> Any:
        """Append; a full disk fails this export alone."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        lines = "".join(json.dumps(json.loads(span.to_json(indent=None))) + "\n" for span in spans)
        try:
            with self._lock, self._path.open("a") as file:
                file.write(lines)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held open."""

    def force_flush(self, timeout_millis: int = 0) -> bool:
        """Everything is written at once."""
        return True


def begin_span(tracer: "Tracer", name: str, traceparent: str, attributes: Mapping[str, Any]) -> "Span":
    """A server's span below the client's, where it sent one; what follows in this context belongs to it."""
    from opentelemetry.trace import SpanKind

    span = tracer.start_span(name, _context(traceparent), SpanKind.SERVER, attributes=dict(attributes))
    context = span.get_span_context()
    current_traceparent.set(f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}")
    return span


def end_span(span: "Span", status: int) -> None:
    """The response's status; from 500 on it is an error."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(StatusCode.ERROR)
    span.end()


def trace_event(tracer: "Tracer", event: RequestEvent) -> None:
    """Spans of what happened to a request after it was admitted; none for one whose web process traced nothing."""
    if not event.traceparent:
        return
    attributes: dict[str, Any] = {
        "penstock.request": event.id,
        "penstock.tenant": event.tenant,
        "penstock.priority": event.priority,
        "penstock.replica": event.replica,
        "penstock.policy": event.policy,
        "penstock.attempts": event.attempts,
        "gen_ai.request.model": event.model,
        "gen_ai.usage.input_tokens": event.prompt_tokens,
        "gen_ai.usage.output_tokens": event.completion_tokens,
        "gen_ai.response.finish_reasons": [event.finish_reason],
    }
    context = _context(event.traceparent)
    for name, begin, end in PHASES:
        begin_s, end_s = getattr(event, begin), getattr(event, end)
        if name == "queue" and end_s is None:  # it ended there
            end_s = event.finished_s
        if begin_s is not None and end_s is not None:
            span = tracer.start_span(name, context, attributes=attributes, start_time=int(begin_s * 1e9))
            span.end(int(max(begin_s, end_s) * 1e9))


def _context(traceparent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})
