"""Waiting for what must come: as long as a starved machine may need, since that it is busy is no failure."""

import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

PATIENCE_S = 120.0
Found = TypeVar("Found")


def wait_until(
    condition: Callable[[], Found], what: object = "it did not happen in time", period_s: float = 0.02
) -> Found:
    """Look until a condition holds, and return what it gave; fails with `what`, or what calling `what` gives."""
    pause, end_s = threading.Event(), time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end_s, what() if callable(what) else what
        pause.wait(period_s)
    return found


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Ask until a condition holds; each question waits for an answer of Redis, so that others go on meanwhile."""
    end_s = time.monotonic() + PATIENCE_S  # a timeout of asyncio's can be lost in the client, and this would not end
    while not await condition():
        assert time.monotonic() < end_s, "it did not happen in time"
