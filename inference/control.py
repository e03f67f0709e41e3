"""Sends control commands to gpu workers and collects their acknowledgements; needs the Celery app, not the engine."""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from celery import current_app
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

TIMEOUT_S = 2.0


def send_control(
    replicas: Sequence[str] | None, command: str, *, timeout_s: float = TIMEOUT_S, **arguments: Any
) -> dict[str, dict[str, Any]]:
    """Tell replicas (None: all there are) to obey a command of docs/protocol.md, such as `pause` or `sizing`.

    Returns an acknowledgement per replica: `ok`, `error` (a sentence), `applied_ms`, `state`. Returns as soon as all
    named have answered; one that did not within `timeout_s` has `ok` false. With None it takes the whole `timeout_s`.
    """
    if replicas is not None and not replicas:
        return {}
    names = None if replicas is None else sorted(set(replicas))
    try:
        acks = _broadcast(names, {"command": command, "arguments": arguments}, timeout_s)
    except (OperationalError, RedisError, OSError) as error:
        logger.warning("No command can be sent: %s", error)
        return {name: _failed("The message broker does not answer.") for name in names or []}
    for name in names or []:
        acks.setdefault(name, _failed(f"No answer within {timeout_s:g} s."))
    return acks


def _broadcast(names: list[str] | None, arguments: dict[str, Any], timeout_s: float) -> dict[str, dict[str, Any]]:
    """One message that the named nodes alone take up, whatever hosts they are on."""
    pattern = "gpu.*@*" if names is None else rf"^gpu\.({'|'.join(map(re.escape, names))})@"
    with current_app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=math.ceil(timeout_s))
        replies = current_app.control.broadcast(
            "penstock_control",
            arguments=arguments,
            reply=True,
            timeout=timeout_s,
            limit=None if names is None else len(names),
            pattern=pattern,
            matcher="glob" if names is None else "pcre",  # type: ignore[arg-type]
            connection=connection,
        )
    return {node.partition("@")[0].removeprefix("gpu."): ack for reply in replies or [] for node, ack in reply.items()}


def _failed(error: str) -> dict[str, Any]:
    return {"ok": False, "error": error, "applied_ms": 0.0, "state": ""}
