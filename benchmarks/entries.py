"""Requests drawn at random for the benchmarks of the queue in Redis."""

import time
from random import Random

from scheduling.core.request import Priority, QueueEntry

NUM_TENANTS = 40


def draw_entries(draw: Random, prefix: str, count: int) -> list[QueueEntry]:
    """Requests of 40 tenants, all priorities and many lengths that arrive now; ids begin with `prefix`."""
    return [
        QueueEntry(
            id=f"{prefix}-{number}",
            tenant=f"tenant-{draw.randrange(NUM_TENANTS)}",
            priority=draw.choice(list(Priority)),
            arrival_s=time.time(),
            prompt_tokens=draw.randint(16, 2048),
            max_tokens=draw.randint(8, 512),
        )
        for number in range(count)
    ]
