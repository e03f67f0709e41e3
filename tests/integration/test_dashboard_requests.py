"""The pages of requests: search, one request's life, and its cancelling."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from django.test import Client

from controlplane.config import Config
from inference.historian import Historian
from inference.models import RequestRecord
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.models import OperatorAction, ServiceLevel
from scheduling.store import execute
from tests.fleet_data import FleetWriter, slots
from tests.history_data import make_requests
from tests.integration.test_dashboard_pages import get_json, signed_in, switch

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    return writer


def recorded(num: int = 230) -> None:
    RequestRecord.objects.bulk_create(make_requests(num, end=NOW, seconds=7000))


def all_pages(client: Client, **query: Any) -> list[str]:
    """Ids of a search, read to its end."""
    ids: list[str] = []
    after = ""
    while after is not None:
        answer = get_json(client, "operator/requests", after=after, **query)
        ids += [row["request_id"] for row in answer["requests"]]
        after = answer["next_after"]
    return ids


def test_a_search_reads_every_match_once_in_order_whatever_the_page_and_ties(fleet: FleetWriter) -> None:
    recorded()
    RequestRecord.objects.filter(priority=1).update(finished_at=NOW)
    client = signed_in()
    expected = list(RequestRecord.objects.order_by("-finished_at", "-id").values_list("request_id", flat=True))
    assert all_pages(client, limit=7) == expected
    assert all_pages(client, limit=200) == expected


@pytest.mark.parametrize(
    "query",
    [
        {"tenant": "support"},
        {"priority": 1},
        {"state": "failed"},
        {"id": "req-01000000000001"},
        {"model": "nothing"},
        {"since": "2026-03-01T11:30:00Z", "until": "2026-03-01T11:45:00Z"},
        {"tenant": "research", "state": "cancelled", "since": "2026-03-01T10:30:00+00:00"},
    ],
)
def test_filters_find_what_a_plain_look_finds(fleet: FleetWriter, query: dict[str, Any]) -> None:
    recorded()
    names = {"id": "request_id__startswith", "since": "finished_at__gte", "until": "finished_at__lt"}
    plain = RequestRecord.objects.filter(**{names.get(name, name): value for name, value in query.items()})
    assert sorted(all_pages(signed_in(), limit=10, **query)) == sorted(plain.values_list("request_id", flat=True))


def test_the_page_of_requests_filters_in_the_readers_zone_and_says_what_it_cannot_use(fleet: FleetWriter) -> None:
    recorded()
    client = signed_in()
    client.cookies["penstock_zone"] = "America%2FNew_York"
    query = {"since": "2026-03-01T06:55", "until": "2026-03-01T07:01", "all": "1"}
    page = client.get("/requests/", query).content.decode()
    assert (
        page.count('class="mono id"')
        == RequestRecord.objects.filter(finished_at__gt=NOW - timedelta(minutes=5)).count()
    )
    assert 'value="2026-03-01T06:55"' in page
    assert "America/New_York" in page
    page = client.get("/requests/", {"since": "2026-02-31T00:00", "state": "lost", "priority": "9"}).content.decode()
    assert page.count('role="alert">') >= 3
    assert "Choose one of finished, failed, cancelled." in page
    client.cookies["penstock_zone"] = "../../etc/passwd"
    assert client.get("/requests/").status_code == 200


def test_hostile_queries_are_refused_or_find_nothing(fleet: FleetWriter) -> None:
    client = signed_in()
    for query in ({"after": "x"}, {"since": "2026-03-01T00:00"}, {"priority": 9}, {"state": "odd"}):
        assert client.get("/api/v1/operator/requests", query).status_code == 400, query
    assert all_pages(client, id="a\0b", tenant="%") == []
    assert client.get("/requests/", {"after": "9" * 50, "id": "\0", "tenant": "'; --"}).status_code == 200
    assert client.get("/requests/%00/").status_code == 404


def test_a_recorded_life_tells_its_phases_and_its_verdicts(fleet: FleetWriter) -> None:
    recorded(20)
    row = RequestRecord.objects.filter(state="finished").first()
    assert row is not None
    ServiceLevel.objects.create(priority=row.priority, ttft_ms=1, e2e_ms=10**8)
    life = get_json(signed_in(), f"operator/requests/{row.request_id}")
    assert [event["kind"] for event in life["events"]] == ["admitted", "claimed", "first", "end"]
    assert "over the target of 1 ms" in life["events"][2]["details"][0]
    assert any("within the target" in line for line in life["events"][3]["details"])
    assert sum(seconds for _, seconds in life["phases"]) == pytest.approx(row.e2e_s)
    assert f"Claimed by {row.replica}" in signed_in().get(f"/requests/{row.request_id}/").content.decode()


def test_a_waiting_life_says_behind_whom_and_why(fleet: FleetWriter) -> None:
    assert switch(signed_in("operator"), "fair", "share").status_code == 200
    for _ in range(3):
        fleet.enqueue("chat")
    mine = fleet.enqueue("chat", 5)
    fleet.publish(fleet.status(slots=slots(16, ["chat"])))
    life = get_json(signed_in(), f"operator/requests/{mine}")
    assert (life["state"], life["ended"]) == ("queued", False)
    told = " ".join(life["events"][1]["details"])
    assert "3 of 4 waiting requests go before it." in told
    assert "fair, revision 1, ranks it by its arrival, in flow chat of weight 1." in told
    assert "All 16 slots are taken." in told
    found = get_json(signed_in(), "operator/requests/live", model="demo")
    assert (len(found["running"]), len(found["waiting"]), found["num_waiting"]) == (16, 4, 4)


def test_an_operator_cancels_what_waits_and_what_runs_and_nobody_else_does(fleet: FleetWriter) -> None:
    running, waiting = fleet.enqueue("chat"), fleet.enqueue("chat")
    assert [request.id for request in fleet.claim()] == [running]
    assert signed_in().post(f"/requests/{waiting}/cancel/", {"reason": "x"}).status_code == 403
    assert signed_in().post(f"/api/v1/operator/requests/{waiting}/cancel", {"reason": "x"}).status_code == 403
    operator = signed_in("operator")
    assert operator.post(f"/requests/{waiting}/cancel/", {}).status_code == 400
    assert operator.post(f"/requests/{waiting}/cancel/", {"reason": "\0"}).status_code == 400
    assert operator.post(f"/requests/{waiting}/cancel/", {"reason": "run\0away"}).json()["was"] == "queued"
    assert operator.post(f"/requests/{waiting}/cancel/", {"reason": "again"}).status_code == 404
    path, bad = f"/api/v1/operator/requests/{running}/cancel", {"reason": "run\0away"}
    assert operator.post(path, bad, content_type="application/json").status_code == 400
    body = {"reason": "runaway"}
    answer = operator.post(f"/api/v1/operator/requests/{running}/cancel", body, content_type="application/json")
    assert answer.json() == {"id": running, "was": "running"}
    assert execute(fleet.client, fleet.queue.take_cancels("gpu-0:1")) == [running]
    actions = list(OperatorAction.objects.values_list("action", "target", "reason", "address").order_by("id"))
    assert actions == [("request.cancel", id_, "runaway", "127.0.0.1") for id_ in (waiting, running)]
    Historian(fleet.client, fleet.keys).run_once()
    assert RequestRecord.objects.get().error_code == "cancelled_by_operator"


def test_a_cancel_that_broke_off_is_ended_by_the_next_one(fleet: FleetWriter) -> None:
    waiting = fleet.enqueue("chat")
    limits = TenantLimits(fleet.keys)
    assert execute(fleet.client, limits.acquire("chat", waiting, rpm=None, tpm=None, concurrency=1, tokens=1)).ok
    execute(fleet.client, fleet.queue.cancel(waiting))
    operator = signed_in("operator")
    assert operator.post(f"/requests/{waiting}/cancel/", {"reason": "runaway"}).json()["was"] == "queued"
    assert execute(fleet.client, limits.usage("chat")).running == 0
    assert operator.post(f"/requests/{waiting}/cancel/", {"reason": "again"}).status_code == 404
    Historian(fleet.client, fleet.keys).run_once()
    assert RequestRecord.objects.get().request_id == waiting
