"""How a worker's process ends when it cannot go on: at once, or after a while in which it says why."""

import logging
import os
import threading
import time

from inference.worker.inbox import Inbox, Told

logger = logging.getLogger("inference.worker")

RETRY_S = 30.0
"""How long a process that cannot serve waits before it ends, to be started again."""


def end_process(failure: threading.ExceptHookArgs) -> None:
    """A thread failed, and the loop cannot go on without it: end, so that the lease runs out and all starts anew."""
    name = failure.thread.name if failure.thread else "a thread"
    logger.critical("%s failed; the engine ends", name, exc_info=failure.exc_value)
    logging.shutdown()
    os._exit(2)


def await_stop(inbox: Inbox) -> None:
    """Show the failed state for a while, rather than load what cannot be loaded over and over."""
    deadline = time.monotonic() + RETRY_S
    while (left_s := deadline - time.monotonic()) > 0:
        if told_to_stop(inbox, left_s):
            return


def told_to_stop(inbox: Inbox, timeout_s: float) -> bool:
    """Whether a command to stop comes within `timeout_s`."""
    words = inbox.read(timeout_s)
    return any(isinstance(word, Told) and word.message.command == "stop" for word in words)
