"""Periodic tasks that do not pile up: a run that finds the one before still going leaves the work to it."""

import threading
from collections.abc import Callable
from functools import wraps


def alone(task: Callable[[], None]) -> Callable[[], None]:
    """At most one run of a task at a time in this process; one that would be the second ends at once.

    So no kind of task takes more than one of the worker's threads, however long it lasts (an outage, a backlog), and as
    many threads as there are lasting kinds, with one more, leave the sweeper its own.
    """
    busy = threading.Lock()

    @wraps(task)
    def run() -> None:
        if not busy.acquire(blocking=False):
            return
        try:
            task()
        finally:
            busy.release()

    return run
