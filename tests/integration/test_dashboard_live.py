"""The live page's feed: one aggregator over a real Redis and database, its sockets, and who may open them."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
import redis
import redis.asyncio
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from channels.db import database_sync_to_async
from django.contrib.auth.models import Group, User
from django.contrib.sessions.models import Session
from django.test import Client

from dashboard.aggregator import MAX_PENDING, Aggregator
from dashboard.consumers import CLOSE_SIGNED_OUT, LiveConsumer
from dashboard.document import DocumentBuilder
from dashboard.readings import FleetReader
from dashboard.routing import build_sockets
from dashboard.selectors.activity import Activity, read_activity
from dashboard.selectors.service import ServiceWatch
from dashboard.state import apply
from scheduling.keys import Keys
from scheduling.models import PolicyRevision, Tenant
from tests.fleet_data import FleetWriter, slots
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.django_db(transaction=True)

ORIGIN = (b"origin", b"http://localhost")


class SteppedClock:
    """Moves a quarter of a second with every look, as the aggregator's ticks do."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        self.now_s += 0.25
        return self.now_s


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    return writer


@pytest.fixture
async def aggregator(astore: redis.asyncio.Redis, keys: Keys) -> AsyncIterator[Aggregator]:
    made = build_aggregator(astore, keys)
    yield made
    await made.stop()


def build_aggregator(client: redis.asyncio.Redis, keys: Keys) -> Aggregator:
    return Aggregator(
        reader=FleetReader(client, keys),
        builder=DocumentBuilder(queue_limit=20),
        read_activity=database_sync_to_async(partial(read_activity, ServiceWatch())),
        clock=SteppedClock(),
    )


def as_json(document: Any) -> Any:
    return json.loads(json.dumps(document))


async def test_a_snapshot_and_the_updates_after_it_give_the_same_state_as_a_fresh_snapshot(
    aggregator: Aggregator, fleet: FleetWriter
) -> None:
    subscription = aggregator.subscribe()
    await aggregator.stop()  # the test ticks by itself
    page = json.loads(await subscription.next())
    requests: list[Any] = []
    for step in range(60):
        if step % 3 == 0:
            fleet.enqueue(f"tenant-{step % 4}", step % 6)
        if step % 5 == 0:
            requests += fleet.claim(2)
        if step % 7 == 0 and requests:
            fleet.finish(requests.pop())
        if step % 4 == 0:
            fleet.publish(fleet.status(slots=slots(step % 9, ["a", "b"], seed=step), waits_s=[0.1] * step))
        if step == 20:
            await Tenant.objects.acreate(name="tenant-0")
            await PolicyRevision.objects.acreate(
                model="demo", revision=1, name="fair", reason="test", actor_name="olga"
            )
        if step == 30:
            fleet.client.delete(fleet.keys.replica("gpu-0"))  # a worker that is lost
        if step == 40:
            FleetWriter(fleet.client, fleet.keys, model="second").deploy()
        if step == 50:
            fleet.client.hdel(fleet.keys.deployments, "demo")
        await aggregator.refresh_activity()
        await aggregator.tick()
        update = json.loads(await subscription.next())
        assert update["type"] == "update"
        page = apply(page, update)
        fresh = as_json(aggregator.snapshot())
        assert {key: page[key] for key in fresh} == fresh
    assert list(page["state"]["models"]) == ["second"]
    assert page["state"]["actions"][0]["text"] == "none → fair"


async def test_the_document_says_what_waits_runs_and_pushes_back(aggregator: Aggregator, fleet: FleetWriter) -> None:
    for priority in (0, 3, 3, 5):
        fleet.enqueue("research", priority, age_s=30)
    for _ in range(12):
        fleet.enqueue("chat", 3)
    fleet.claim(1)
    fleet.publish(fleet.status(slots=slots(3, ["chat"]), kv_used=512, waits_s=[0.2, 0.3]))
    await aggregator.tick()
    model = aggregator.snapshot()["state"]["models"]["demo"]
    assert (model["depth"], model["running"]) == (15, 1)
    assert sum(model["by_priority"].values()) == sum(model["by_tenant"].values()) == 15
    assert model["by_tenant"]["chat"] == 12
    assert model["backpressure"]["name"] == "medium"
    assert model["backpressure"]["refused"] == ["low", "bulk"]
    assert model["policy"]["name"] == "fifo"
    assert model["policy"]["guarantee"]
    assert model["kv_usage"] == 0.25
    assert model["waits"]["queue"]["num"] == 2
    replica = aggregator.snapshot()["state"]["replicas"]["gpu-0"]
    assert len(replica["slots"]) == 3
    assert replica["telemetry"]["source"] == "host"


async def test_a_worker_whose_status_ran_out_is_shown_as_lost(aggregator: Aggregator, fleet: FleetWriter) -> None:
    fleet.publish(fleet.status(slots=slots(2, ["chat"])))
    await aggregator.tick()
    fleet.client.delete(fleet.keys.replica("gpu-0"))
    await aggregator.tick()
    replica = aggregator.snapshot()["state"]["replicas"]["gpu-0"]
    assert (replica["state"], replica["slots"]) == ("lost", [])


async def test_a_socket_that_is_too_slow_gets_one_snapshot_instead_of_a_pile(
    aggregator: Aggregator, fleet: FleetWriter
) -> None:
    slow, quick = aggregator.subscribe(), aggregator.subscribe()
    await aggregator.stop()
    first = json.loads(await slow.next())
    await quick.next()
    for _ in range(MAX_PENDING + 3):
        await aggregator.tick()
        await quick.next()
    again = json.loads(await slow.next())
    assert again["type"] == "snapshot"
    assert again["seq"] == first["seq"] + MAX_PENDING + 3
    await aggregator.tick()
    update = json.loads(await slow.next())
    assert (update["type"], update["seq"]) == ("update", again["seq"] + 1)


async def test_an_update_is_serialised_once_for_all_sockets(aggregator: Aggregator) -> None:
    one, other = aggregator.subscribe(), aggregator.subscribe()
    await aggregator.stop()
    assert await one.next() is await other.next()
    await aggregator.tick()
    assert await one.next() is await other.next()


async def test_a_feed_whose_one_half_ended_begins_anew_without_a_second_other_half(
    astore: redis.asyncio.Redis, keys: Keys
) -> None:
    async def broken() -> Activity:
        raise LookupError

    aggregator = Aggregator(
        reader=FleetReader(astore, keys), builder=DocumentBuilder(queue_limit=20), read_activity=broken
    )
    aggregator.start()
    reading, following = aggregator._tasks
    with pytest.raises(LookupError):
        await following
    aggregator.start()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(reading, PATIENCE_S)
    with pytest.raises(LookupError):
        await aggregator._tasks[1]
    aggregator._tasks.pop()
    await aggregator.stop()


async def test_a_redis_that_is_away_is_a_fault_on_the_page_and_not_the_end_of_the_feed(keys: Keys) -> None:
    client = redis.asyncio.Redis.from_url("unix:///nowhere/redis.sock")
    aggregator = build_aggregator(client, keys)
    await aggregator.tick()
    await aggregator.tick()
    snapshot = aggregator.snapshot()
    assert snapshot["seq"] == 2
    assert "does not answer" in snapshot["state"]["faults"]["redis"]["message"]
    await client.aclose()


# Sockets


def sign_in(group: str | None, name: str = "vera") -> str:
    """A session's cookie."""
    user = User.objects.create_user(name, password="x")
    if group:
        user.groups.add(Group.objects.get_or_create(name=group)[0])
    client = Client()
    client.force_login(user)
    return str(client.cookies["sessionid"].value)


class Socket:
    """A browser's end of the socket."""

    def __init__(self, application: Any, scope: dict[str, Any]) -> None:
        self._end: Any = ApplicationCommunicator(application, scope)  # type: ignore[no-untyped-call]

    async def connect(self) -> bool:
        """Whether the handshake succeeded."""
        await self._end.send_input({"type": "websocket.connect"})
        return bool((await self.take())["type"] == "websocket.accept")

    async def take(self) -> dict[str, Any]:
        """The next ASGI event of the server's."""
        return await self._end.receive_output(timeout=PATIENCE_S)  # type: ignore[no-any-return]

    async def ask_snapshot(self) -> None:
        """Say that an update was missed."""
        await self._end.send_input({"type": "websocket.receive", "text": "snapshot"})

    async def receive(self) -> dict[str, Any]:
        """The next message."""
        return json.loads((await self.take())["text"])  # type: ignore[no-any-return]

    async def disconnect(self) -> None:
        await self._end.send_input({"type": "websocket.disconnect", "code": 1000})
        await self._end.wait(timeout=PATIENCE_S)


def open_socket(
    aggregator: Aggregator, session: str | None, origin: tuple[bytes, bytes] | None = ORIGIN, path: str = "/live/"
) -> Socket:
    headers = [(b"host", b"localhost")] + ([] if origin is None else [origin])
    if session:
        headers.append((b"cookie", f"sessionid={session}".encode()))
    scope = {"type": "websocket", "path": path, "query_string": b"", "headers": headers, "subprotocols": []}
    return Socket(build_sockets(aggregator), scope)


@pytest.fixture
def viewers(db: None) -> None:
    """The group as the migrations leave it, also where a test before this one emptied the tables."""
    from django.contrib.auth.models import Permission

    group, _ = Group.objects.get_or_create(name="viewer")
    group.permissions.add(Permission.objects.get(codename="view_policyrevision"))


@pytest.mark.usefixtures("viewers")
async def test_a_viewer_gets_state_and_then_updates(aggregator: Aggregator, fleet: FleetWriter) -> None:
    communicator = open_socket(aggregator, await sync_to_async(sign_in)("viewer"))
    assert await communicator.connect()
    page = await communicator.receive()
    assert page["type"] == "snapshot"
    fleet.enqueue("chat")
    async with asyncio.timeout(PATIENCE_S):
        while page["state"]["models"].get("demo", {}).get("depth") != 1:
            page = apply(page, await communicator.receive())
        await communicator.ask_snapshot()
        while (await communicator.receive())["type"] != "snapshot":
            pass
    await communicator.disconnect()


@pytest.mark.usefixtures("viewers")
async def test_who_is_not_signed_in_or_comes_from_another_site_is_refused(aggregator: Aggregator) -> None:
    session = await sync_to_async(sign_in)("viewer")
    no_group = await sync_to_async(sign_in)(None, "nobody")
    other_site, other_port = (b"origin", b"https://evil.example"), (b"origin", b"http://localhost:9999")
    for cookie, origin in (
        (None, ORIGIN),
        ("bogus", ORIGIN),
        (no_group, ORIGIN),
        (session, other_site),
        (session, other_port),
        (session, None),
    ):
        communicator = open_socket(aggregator, cookie, origin)
        assert not await communicator.connect(), (cookie, origin)
    assert not await open_socket(aggregator, session, path="/elsewhere/").connect()


@pytest.mark.usefixtures("viewers")
async def test_a_socket_ends_with_its_session(aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveConsumer, "session_check_s", 0.05)
    communicator = open_socket(aggregator, await sync_to_async(sign_in)("viewer"))
    assert await communicator.connect()
    await Session.objects.all().adelete()
    async with asyncio.timeout(PATIENCE_S):
        while (message := await communicator.take())["type"] != "websocket.close":
            pass
    assert message["code"] == CLOSE_SIGNED_OUT
