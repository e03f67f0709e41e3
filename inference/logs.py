"""How log records look: lines for people or JSON for collectors, each with the request that it is about."""

import json
import logging
import os
import threading
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["line", "json"]

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""The request that is being served, as `X-Request-Id` names it; empty outside of one."""

LINE = "{asctime} {levelname} {name}: {message}"
STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
OUTAGE_PERIOD_S = 15.0


class LineFormatter(logging.Formatter):
    """A line, with the request's id at its end where there is one."""

    def __init__(self) -> None:
        super().__init__(LINE, style="{")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = super().formatMessage(record)
        current = current_request.get()
        return f"{line} [{current}]" if current else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what the caller passed as `extra` comes along. `service` is OTEL_SERVICE_NAME's value."""

    def __init__(self, service: str = "penstock") -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "service": self._service,
            "pid": os.getpid(),
        }
        if current := current_request.get():
            fields["request_id"] = current
        fields |= {name: value for name, value in record.__dict__.items() if name not in STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def make_formatter(kind: LogFormat) -> logging.Formatter:
    """The formatter of a setting."""
    return JsonFormatter(os.environ.get("OTEL_SERVICE_NAME", "penstock")) if kind == "json" else LineFormatter()


class OutageFilter(logging.Filter):
    """Makes one sentence every 15 s of Celery's tracebacks while Redis is away: beat has two for every task."""

    def __init__(self, who: str) -> None:
        """`who waits`, as the sentence begins."""
        super().__init__()
        self._who = who
        self._lock = threading.Lock()
        self._said_s = -OUTAGE_PERIOD_S

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or not _is_outage(error):
            return True
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._said_s < OUTAGE_PERIOD_S:
                return False
            self._said_s = now_s
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args = "%s, since Redis does not answer: %s", (self._who, _root(error))
        record.exc_info = record.exc_text = None
        return True


def _is_outage(error: BaseException) -> bool:
    """Whether Redis (or a socket) is at the bottom of it. Celery and kombu wrap, each in classes of their own."""
    return isinstance(_root(error), OSError) or any(
        part in ("redis.exceptions", "kombu.exceptions") for part in (type(e).__module__ for e in _chain(error))
    )


def _root(error: BaseException) -> BaseException:
    return _chain(error)[-1]


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    return chain
