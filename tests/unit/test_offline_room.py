"""Offline work leaves slots for live requests that come."""

from typing import Any

from controlplane.offline.room import MOST, TRICKLE, UNSERVED, offline_room
from inference.gateway.monitor import FleetStatus
from inference.messages import ReplicaStatus, Slot
from scheduling.core.answers import QueueSnapshot
from scheduling.core.request import Priority


def status(*replicas: tuple[int, int, int], state: Any = "ready", waiting: dict[int, int] | None = None) -> FleetStatus:
    """Replicas of so many slots, live requests and offline ones."""
    said = [
        ReplicaStatus(
            replica=f"gpu{i}", model="m", host="h", pid=1, state=state, time_s=0.0, started_s=0.0, max_batch_size=slots,
            slots=[
                Slot("r", "t", priority, 1, 1, 1)
                for priority in [Priority.NORMAL] * live + [Priority.BULK] * bulk
            ],
        )
        for i, (slots, live, bulk) in enumerate(replicas)
    ]  # fmt: skip
    return FleetStatus(time_s=0.0, replicas=said, snapshot=QueueSnapshot(by_priority=waiting or {}))


def test_offline_work_takes_half_of_the_slots_at_most() -> None:
    assert offline_room(status((8, 0, 0))) == 4
    assert offline_room(status((8, 0, 4), (4, 0, 2))) == 6
    assert offline_room(status((256, 0, 0))) == MOST
    assert offline_room(status((1, 0, 0))) == TRICKLE


def test_live_requests_that_run_leave_it_what_is_free_and_those_that_wait_next_to_nothing() -> None:
    assert offline_room(status((8, 3, 0))) == 4
    assert offline_room(status((8, 6, 2))) == 2
    assert offline_room(status((8, 8, 0))) == TRICKLE
    assert offline_room(status((8, 0, 0), waiting={Priority.HIGH: 1})) == TRICKLE
    assert offline_room(status((8, 0, 0), waiting={Priority.BULK: 3})) == 4


def test_while_no_worker_takes_requests_few_wait_in_front_of_those_that_come() -> None:
    assert offline_room(status()) == offline_room(status((64, 0, 0), state="draining")) == UNSERVED < MOST
