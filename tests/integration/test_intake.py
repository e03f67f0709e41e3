"""The intake: claims in order, for no more room than was offered."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from inference.messages import RequestEvent
from inference.worker import intake as intake_module
from inference.worker.active import ActiveRequest, open_request
from inference.worker.inbox import Inbox
from inference.worker.intake import Intake
from inference.worker.lease import Lease
from scheduling.core.answers import ClaimedRequest
from scheduling.core.room import NO_ROOM, Room, UrgentRoom
from scheduling.core.rules import MAX_EXPIRED
from scheduling.core.sequence import SamplingParams
from scheduling.keys import Keys
from scheduling.store import connect, execute
from tests.integration.fleet import FleetClient
from tests.patience import PATIENCE_S, wait_until
from tests.sequences import SilentStream


def read(claimed: ClaimedRequest, owner: str) -> ActiveRequest:
    new_stream: Callable[[SamplingParams], Any] = lambda sampling: SilentStream()  # noqa: E731
    return open_request(claimed, owner=owner, model="m", new_stream=new_stream, now_s=time.time())


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys) -> FleetClient:
    return FleetClient(store, keys, "m")


@pytest.fixture
def intake(redis_url: str, keys: Keys, fleet: FleetClient) -> Iterator[Intake]:
    client = connect(redis_url)
    intake = Intake(client, fleet.queue, keys.bell("m"), Lease("g", 600.0), read=read, inbox=Inbox())
    intake.start()
    yield intake
    intake.close()
    client.close()


def take(intake: Intake, num: int) -> list[str]:
    return [active.request.id for active in take_active(intake, num)]


def take_active(intake: Intake, num: int) -> list[ActiveRequest]:
    taken: list[ActiveRequest] = []
    wait_until(lambda: taken.extend(intake.take()) or len(taken) >= num, period_s=0.002)  # type: ignore[func-returns-value]
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


def test_an_idle_intake_claims_what_no_room_will_fit_so_that_it_can_be_refused(
    intake: Intake, fleet: FleetClient
) -> None:
    fleet.submit("huge", [1] * 50, 5)
    fleet.submit("next", [1], 5)
    intake.offer(Room(4, 20), is_idle=True)
    assert take(intake, 1) == ["huge"]
    intake.offer(Room(4, 20), is_idle=True)
    assert take(intake, 1) == ["next"]


@pytest.fixture
def no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """An intake that waits for the bell after a claim, waits for longer than a test does."""
    monkeypatch.setattr(intake_module, "BELL_WAIT_S", 10 * PATIENCE_S)


@pytest.mark.usefixtures("no_second_look")
def test_a_waiting_intake_claims_as_soon_as_the_bell_rings(intake: Intake, fleet: FleetClient) -> None:
    intake.offer(Room(1, 100), is_idle=True)
    fleet.submit("r", [1], 5)
    assert take(intake, 1) == ["r"]


@pytest.mark.usefixtures("no_second_look")
def test_requests_past_their_deadline_are_ended_at_a_claim_and_never_given(intake: Intake, fleet: FleetClient) -> None:
    for i in range(2 * MAX_EXPIRED + 7):
        fleet.submit(f"late{i}", [1], 5, deadline_s=time.time() - 1)
    fleet.submit("r", [1], 5, deadline_s=time.time() + 600)
    intake.offer(Room(1, 100), is_idle=False)
    assert take(intake, 1) == ["r"], "a claim that was cut short is repeated at once"
    late = [answer for name, answer in fleet.answers.items() if name != "r"]
    fleet.until(lambda: all(answer.finish for answer in late))
    assert {answer.finish.error_code for answer in late if answer.finish} == {"deadline_exceeded"}
    assert len(fleet.events(RequestEvent)) == len(late), "each is ended once"


def test_a_full_intake_looks_how_many_wait_and_claims_one_that_may_take_a_place(
    intake: Intake, fleet: FleetClient
) -> None:
    fleet.use_policy("priority")
    fleet.submit("low", [1, 2, 3], 5, priority=4)
    fleet.submit("high", [1, 2, 3], 5, priority=1)
    intake.offer(NO_ROOM, is_idle=False)
    fleet.until(lambda: intake.depth == 2)
    assert not intake.take()
    intake.offer(NO_ROOM, is_idle=False, urgent=UrgentRoom(0, 100))
    fleet.submit("critical", [1, 2, 3], 5, priority=0)
    [taken] = take_active(intake, 1)
    assert (taken.request.id, taken.sequence.is_urgent) == ("critical", True)
    intake.offer(Room(1, 100), is_idle=False, urgent=UrgentRoom(3, 100))
    [taken] = take_active(intake, 1)
    assert (taken.request.id, taken.sequence.is_urgent) == ("high", False)


def test_an_intake_that_is_offered_no_room_at_all_claims_nothing_though_its_engine_is_idle(
    intake: Intake, fleet: FleetClient
) -> None:
    intake.offer(NO_ROOM, is_idle=True)
    fleet.submit("r", [1], 5)
    fleet.until(lambda: intake.depth == 1)
    looked_s = intake._looked_s
    fleet.until(lambda: intake._looked_s > looked_s or intake._claimed)
    assert intake.take() == []
    assert execute(fleet.client, fleet.queue.snapshot()).running == 0
