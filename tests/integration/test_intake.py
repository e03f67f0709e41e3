"""The intake: claims in order, for no more room than was offered."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from inference.worker.active import ActiveRequest, open_request
from inference.worker.inbox import Inbox
from inference.worker.intake import Intake
from inference.worker.lease import Lease
from scheduling.core.answers import ClaimedRequest
from scheduling.core.planner import Room
from scheduling.keys import Keys
from scheduling.store import connect, execute
from tests.integration.fleet import FleetClient


class Silent:
    """A text stream without text."""

    stopped = False

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def read(claimed: ClaimedRequest, owner: str) -> ActiveRequest:
    new_stream: Callable[[tuple[str, ...]], Any] = lambda stop: Silent()  # noqa: E731
    return open_request(claimed, owner=owner, model="m", new_stream=new_stream, now_s=time.time())


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys) -> FleetClient:
    return FleetClient(store, keys, "m")


@pytest.fixture
def intake(redis_url: str, keys: Keys, fleet: FleetClient) -> Iterator[Intake]:
    client = connect(redis_url)
    intake = Intake(client, fleet.queue, keys.bell("m"), Lease("g", 5.0), read=read, inbox=Inbox())
    intake.start()
    yield intake
    intake.close()
    client.close()


def take(intake: Intake, num: int) -> list[str]:
    taken: list[str] = []
    deadline = time.monotonic() + 10
    while len(taken) < num and time.monotonic() < deadline:
        taken += [active.request.id for active in intake.take()]
        threading.Event().wait(0.002)
    return taken


def test_no_more_is_claimed_than_there_was_room_for(intake: Intake, fleet: FleetClient) -> None:
    for i in range(10):
        fleet.submit(f"r{i}", [1, 2, 3], 5)
    intake.offer(Room(2, 100), is_idle=True)
    assert take(intake, 2) == ["r0", "r1"]
    assert execute(fleet.client, fleet.queue.snapshot()).running == 2
    intake.offer(Room(3, 7), is_idle=False)
    assert take(intake, 2) == ["r2", "r3"]
    intake.offer(Room(3, 100), is_idle=False)
    assert take(intake, 3) == ["r4", "r5", "r6"]
    snapshot = execute(fleet.client, fleet.queue.snapshot())
    assert (snapshot.running, snapshot.depth) == (7, 3)


def test_a_waiting_intake_claims_as_soon_as_the_bell_rings(intake: Intake, fleet: FleetClient) -> None:
    intake.offer(Room(4, 100), is_idle=True)
    fleet.submit("r", [1], 5)
    started = time.monotonic()
    assert take(intake, 1) == ["r"]
    assert time.monotonic() - started < 1


def test_an_idle_intake_claims_what_no_room_will_fit_so_that_it_can_be_refused(
    intake: Intake, fleet: FleetClient
) -> None:
    fleet.submit("huge", [1] * 50, 5)
    fleet.submit("next", [1], 5)
    intake.offer(Room(4, 20), is_idle=True)
    assert take(intake, 1) == ["huge"]
    intake.offer(Room(4, 20), is_idle=True)
    assert take(intake, 1) == ["next"]
