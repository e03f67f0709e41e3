"""How many offline requests may be under way at once: as many as live ones will not miss."""

from inference.gateway.monitor import FleetStatus
from scheduling.core.request import Priority

MOST = 16
"""Requests of all batches together in queue and engines."""
TRICKLE = 1
"""While live requests wait, and where live ones have all slots: offline work goes on, and takes next to nothing."""
UNSERVED = 4
"""While no worker is there: they wait, and are in front of what comes after them."""
SHARE = 2
"""Offline work has one slot in so many at most: a live request that comes finds one without waiting for an answer."""


def offline_room(status: FleetStatus) -> int:
    """Offline requests of a model that may wait or run now. Under `fifo` each goes before what comes after it."""
    waiting = status.snapshot.by_priority if status.snapshot is not None else {}
    if any(waiting.get(priority, 0) for priority in Priority if priority != Priority.BULK):
        return TRICKLE
    ready = [replica for replica in status.replicas if replica.state == "ready"]
    if not ready:
        return UNSERVED
    slots = sum(replica.max_batch_size for replica in ready)
    live = sum(slot.priority != Priority.BULK for replica in ready for slot in replica.slots)
    return max(TRICKLE, min(MOST, slots // SHARE, slots - live))
