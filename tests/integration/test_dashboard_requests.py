"""The pages of requests: search, one request's life, and its cancelling."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from django.test import Client

from controlplane.config import Config
from dashboard.selectors.waiting import Held, explain_others
from inference.historian import Historian
from inference.messages import InferenceRequest, Mark, Slot
from inference.models import BatchRecord, RequestRecord
from scheduling.core.answers import QueueSnapshot, RequestRecordView
from scheduling.core.request import QueueEntry
from scheduling.core.sequence import SamplingParams
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.models import OperatorAction, PolicyRevision, ServiceLevel
from scheduling.store import execute
from tests.fleet_data import FleetWriter, slots
from tests.history_data import make_batches, make_requests
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
    furthest = {"since": "2026-03-01T12:00:00-23:59"}  # PostgreSQL itself takes no zone further than 16 h
    assert client.get("/api/v1/operator/requests", furthest).status_code == 200
    assert client.get("/requests/", furthest).status_code == 200
    assert client.get("/requests/", {"after": "9" * 50, "id": "\0", "tenant": "'; --"}).status_code == 200
    assert client.get("/requests/%00/").status_code == 404


def test_a_recorded_life_tells_its_phases_and_its_verdicts(fleet: FleetWriter) -> None:
    recorded(20)
    row = RequestRecord.objects.filter(state="finished").first()
    assert row is not None
    ServiceLevel.objects.create(priority=row.priority, ttft_ms=1, e2e_ms=10**8)
    life = get_json(signed_in(), f"operator/requests/{row.request_id}")
    assert [event["kind"] for event in life["events"]] == ["admitted", "queued", "claimed", "first", "end"]
    assert "over the target of 1.0 ms" in life["events"][3]["details"][0]
    assert any("within the target" in line for line in life["events"][4]["details"])
    assert sum(seconds for _, seconds in life["phases"]) == pytest.approx(row.e2e_s)
    assert f"Claimed by {row.replica}" in signed_in().get(f"/requests/{row.request_id}/").content.decode()


def test_a_recorded_life_tells_what_its_worker_noted_and_why_it_had_waited(fleet: FleetWriter) -> None:
    def record(name: str, tenant: str, came_s: float, claimed_s: float, **fields: Any) -> RequestRecord:
        return RequestRecord.objects.create(
            request_id=name, model="demo", tenant=tenant, priority=5, endpoint="completions", state="finished",
            finish_reason="stop", arrived_at=NOW + timedelta(seconds=came_s),
            claimed_at=NOW + timedelta(seconds=claimed_s), first_token_at=NOW + timedelta(seconds=claimed_s + 0.5),
            finished_at=NOW + timedelta(seconds=claimed_s + 8), prompt_tokens=30, completion_tokens=40, max_tokens=64,
            replica="gpu-0", policy="priority", policy_revision=2, **fields,
        )  # fmt: skip

    PolicyRevision.objects.create(model="demo", revision=2, name="priority", params={})
    marks = [[2200, "started", 0], [3000, "displaced", 10], [7000, "resumed", 10]]
    timeline = {"marks": marks, "tokens": [[2460, 6], [2560, 4], [7100, 30]], "span_ms": 100}
    row = record("mine", "nightly", 0, 2, timeline=timeline)
    for number in range(3):
        record(f"before-{number}", "checkout", -1, 0.5)
    record("later", "support", 1, 1.5)
    record("after", "support", 1, 2.5)
    BatchRecord.objects.bulk_create(make_batches(4, end=NOW + timedelta(seconds=1)))
    BatchRecord.objects.update(max_batch_size=16)
    life = get_json(signed_in(), "operator/requests/mine")
    kinds = [event["kind"] for event in life["events"]]
    assert kinds == ["admitted", "queued", "claimed", "started", "first", "tokens", "lost", "resumed", "tokens", "end"]
    queued, lost, resumed = (life["events"][place]["details"] for place in (1, 6, 7))
    assert queued[0].startswith("Behind 4 requests that were claimed while it waited: 3 of checkout, 1 of support.")
    assert queued[0].endswith("1 of them came after it.")
    assert queued[1] == "priority, revision 2, ranks it by its arrival."
    assert "of 16 slots, with" in queued[2]
    assert lost == ["A request of higher priority took its slot, after 10 output tokens."]
    assert resumed == ["After 4.0 s."]
    assert [(name, round(seconds, 1)) for name, seconds in life["phases"]] == [
        ("queued", 2.0), ("ready", 0.2), ("prefill", 0.3), ("decode", 0.5), ("preempted", 4.0), ("decode", 3.0),
    ]  # fmt: skip
    assert life["tokens"] == [[2.46, 6], [2.56, 4], [7.1, 30]]
    page = signed_in().get(f"/requests/{row.request_id}/").content.decode()
    assert page.count("tokens</title>") == 3
    assert 'x="25.00"' in page, "the first column begins with the first token, wherever its span does"


def test_a_running_life_tells_what_its_worker_says_of_it(fleet: FleetWriter) -> None:
    mine = fleet.enqueue("chat", age_s=9)
    fleet.claim()
    marks = [Mark(4100, "started", 0), Mark(6000, "preempted", 12)]
    slot = Slot(mine, "chat", 3, 24, 12, 64, 4000, 4300, marks)
    fleet.publish(fleet.status(slots=[slot]))
    life = get_json(signed_in(), f"operator/requests/{mine}")
    assert [event["kind"] for event in life["events"]] == ["admitted", "claimed", "started", "first", "lost", "running"]
    assert life["events"][-1]["title"] == "Waits in its worker for a place"
    assert life["events"][-1]["details"] == ["12 of at most 64 tokens."]
    assert [name for name, _ in life["phases"]] == ["queued", "ready", "prefill", "decode", "preempted"]


def test_a_waiting_life_says_behind_whom_and_why(fleet: FleetWriter) -> None:
    assert switch(signed_in("operator"), "fair", "share").status_code == 200
    for _ in range(3):
        fleet.enqueue("chat")
    mine = fleet.enqueue("chat", 5)
    fleet.enqueue("research")
    fleet.publish(fleet.status(slots=slots(16, ["chat"])))
    life = get_json(signed_in(), f"operator/requests/{mine}")
    assert (life["state"], life["ended"]) == ("queued", False)
    told = " ".join(life["events"][1]["details"])
    assert "of 5 waiting requests go before it: 3 of its own flow" in told
    assert "Before it in its flow: 3 of chat. Other flows, which take turns by what they were served: 1 of rese" in told
    assert "fair, revision 1, ranks it by its arrival, in flow chat of weight 1." in told
    assert "All 16 slots are taken." in told
    found = get_json(signed_in(), "operator/requests/live", model="demo")
    assert (len(found["running"]), len(found["waiting"]), found["num_waiting"]) == (16, 5, 5)


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
    again = operator.post(f"/api/v1/operator/requests/{running}/cancel", body, content_type="application/json")
    assert again.json() == {"id": running, "was": "cancelling"}
    told = operator.post(f"/requests/{running}/cancel/", {"reason": "again"}).json()["message"]
    assert told == f"{running} is being cancelled already."
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


def test_a_request_for_an_upstream_is_explained_by_the_length_that_the_queue_orders_it_by() -> None:
    request = InferenceRequest(
        id="mine", model="demo", tenant="acme", priority=3, arrival_s=100.0, prompt_token_ids=[], max_tokens=10,
        sampling=SamplingParams(), forwarded=b"{}", estimated_prompt_tokens=4000,
    )  # fmt: skip
    other = QueueEntry(id="o", tenant="beta", priority=3, arrival_s=50.0, prompt_tokens=4000, max_tokens=10)
    held = Held(
        request=request,
        record=RequestRecordView("queued", 0, "", None, 0, b""),
        snapshot=QueueSnapshot(depth=1, policy="size"),
        position=None,
        replicas=[],
        others=[other],
    )
    assert explain_others(held) == "Before it in its flow: 1 of beta."
