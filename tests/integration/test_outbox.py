"""The outbox: whatever it hands over may be handed over again, since a reply was lost."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from inference.worker.active import ActiveRequest, open_request
from inference.worker.inbox import Inbox
from inference.worker.lease import Lease
from inference.worker.outbox import Handover, Outbox
from scheduling.core.sequence import SamplingParams
from scheduling.keys import Keys
from scheduling.store import connect, execute
from tests.integration.fleet import FleetClient
from tests.sequences import SilentStream


@pytest.fixture
def outbox(redis_url: str, keys: Keys, fleet: FleetClient) -> Iterator[Outbox]:
    with connect(redis_url) as client:
        yield Outbox(client, keys, fleet.queue, lease=Lease("g", 600.0), inbox=Inbox())


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys) -> FleetClient:
    return FleetClient(store, keys, "m")


def claim(fleet: FleetClient, owner: str) -> ActiveRequest:
    command = fleet.queue.claim(owner, max_requests=1, max_tokens=99, lease_s=600.0)
    [claimed] = execute(fleet.client, command).requests
    new_stream: Callable[[SamplingParams], Any] = lambda sampling: SilentStream()  # noqa: E731
    return open_request(claimed, owner=owner, model="m", new_stream=new_stream, now_s=time.time())


@pytest.mark.parametrize("kind", ["releases", "failures"])
def test_a_repeated_handover_gives_back_no_later_attempt_and_counts_a_failure_once(
    outbox: Outbox, fleet: FleetClient, kind: str
) -> None:
    fleet.submit("r", [1, 2, 3], 5)
    first = claim(fleet, "g:1")
    handover = Handover("g:1")
    getattr(handover, kind)["r"] = first.attempt
    outbox._deliver(handover)
    second = claim(fleet, "g:1")
    outbox._deliver(handover)
    assert fleet.num_running() == 1, "the second attempt goes on"
    assert (second.attempt, second.failures) == (2, int(kind == "failures"))
    execute(fleet.client, fleet.queue.release("g:1"))
    assert claim(fleet, "g:1").failures == int(kind == "failures")
