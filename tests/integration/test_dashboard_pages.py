"""The operator's pages and the API beside them: what they show, to whom, and in which zone."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from django.contrib.auth.models import Group, User
from django.test import Client
from django.utils import timezone
from pytest_django.fixtures import Settings

from controlplane.config import Config
from dashboard.models import RequestRollup
from dashboard.page import PAGES
from dashboard.rollups import roll_up
from dashboard.selectors.history import METRICS, choose_period, read_series
from dashboard.selectors.tenants import MAX_TENANTS
from inference.models import BatchRecord, Replica, RequestRecord
from scheduling.audit import record_action
from scheduling.cells import safe_cell
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.models import OperatorAction, PolicyRevision, Quota, ServiceLevel, Tenant
from scheduling.store import execute
from tests.fleet_data import FleetWriter
from tests.history_data import make_batches, make_requests

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def signed_in(group: str = "viewer") -> Client:
    user, _ = User.objects.get_or_create(username=group or "nora")
    if group:
        user.groups.add(Group.objects.get(name=group))
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    return writer


def get_json(client: Client, path: str, **query: Any) -> Any:
    answer = client.get(f"/api/v1/{path}", query)
    assert answer.status_code == 200, answer.content
    return answer.json()


@pytest.mark.parametrize("path", ["/", *(f"/{name}/" for name, _ in PAGES[1:])])
def test_a_page_is_for_members_of_a_group_and_stands_without_any_data(fleet: FleetWriter, path: str) -> None:
    assert Client().get(path).headers["location"] == f"/login/?next={path}"
    assert signed_in("").get(path).status_code == 403
    page = signed_in().get(path)
    assert page.status_code == 200
    assert 'aria-current="page"' in page.content.decode()
    assert signed_in().post(path).status_code == 405


def test_pages_stand_without_any_model(store: redis.Redis, installation: Config) -> None:
    for _name, path in [("", "/"), *((name, f"/{name}/") for name, _ in PAGES[1:])]:
        assert signed_in().get(path).status_code == 200


def switch(client: Client, policy: str, reason: str, **params: str) -> Any:
    form = {"policy": policy, "reason": reason, **{f"{policy}.{name}": value for name, value in params.items()}}
    return client.post("/queues/demo/policy/", form)


def test_every_wrong_field_is_named_with_its_bounds(fleet: FleetWriter) -> None:
    answer = switch(signed_in("operator"), "wrr", "why", high="soon", share_of="love", low="10")
    assert answer.status_code == 400
    assert answer.json()["fields"] == {
        "wrr.high": "high must be a number from 0.01 to 1,000.",
        "wrr.share_of": "share_of must be one of tokens, requests.",
    }
    assert not PolicyRevision.objects.exists()


def test_revisions_are_listed_newest_first_and_read_on_from_where_a_page_ended(fleet: FleetWriter) -> None:
    operator = signed_in("operator")
    for level in range(17):
        assert switch(operator, "priority", f"try {level}", level_s=str(10 + level)).status_code == 200
    page = signed_in().get("/policies/").content.decode()
    assert "try 16" in page
    assert "try 1<" not in page
    assert "try 1<" in signed_in().get("/policies/", {"before": "3"}).content.decode()
    first = get_json(signed_in(), "operator/revisions", model="demo", limit=10)
    assert [row["revision"] for row in first["revisions"]] == list(range(17, 7, -1))
    rest = get_json(signed_in(), "operator/revisions", model="demo", before=first["next_before"])
    assert [row["revision"] for row in rest["revisions"]] == list(range(7, 0, -1))
    assert rest["next_before"] is None
    assert rest["revisions"][0]["previous_params"] == {"level_s": 15.0}
    assert (rest["revisions"][0]["by"], rest["revisions"][0]["reason"]) == ("operator", "try 6")


@pytest.mark.parametrize(
    "path",
    [
        "operator/revisions?model=demo",
        "operator/requests",
        "operator/requests/live?model=demo",
        "operator/history?model=demo",
        "operator/tenants",
        "operator/audit",
    ],
)
def test_the_api_of_pages_is_for_viewers(fleet: FleetWriter, path: str) -> None:
    assert Client().get(f"/api/v1/{path}").status_code == 401
    assert signed_in("").get(f"/api/v1/{path}").status_code == 403
    assert signed_in().get(f"/api/v1/{path}").status_code == 200


# Fleet


@pytest.mark.parametrize(
    ("command", "form", "problem"),
    [
        ("set_batch_size", {"max_batch_size": "0"}, {"max_batch_size": "whole number from 1 to 4,096"}),
        ("set_batch_size", {"max_batch_size": "ten"}, {"max_batch_size": "whole number"}),
        ("set_mode", {"mode": "magic"}, {"mode": "one of continuous, dynamic, static, serial"}),
        ("sizing", {"sizing": "magic"}, {"sizing": "one of fixed"}),
        ("sizing", {"sizing": "balanced", "balanced.gain": "9"}, {"balanced.gain": "from 0.05 to 2"}),
        ("sizing", {"sizing": "balanced", "balanced.largest": "2", "balanced.smallest": "4"}, {"sizing": "smallest"}),
    ],
)
def test_what_a_worker_cannot_be_told_is_refused_at_its_field(
    fleet: FleetWriter, command: str, form: dict[str, str], problem: dict[str, str]
) -> None:
    answer = signed_in("operator").post(f"/workers/gpu-0/{command}/", {"reason": "tune", **form})
    assert answer.status_code == 400
    ((field, sentence),) = problem.items()
    assert list(answer.json()["fields"]) == [field]
    assert sentence in answer.json()["fields"][field]


def test_a_command_that_no_worker_confirms_is_said_and_kept_with_its_arguments(fleet: FleetWriter) -> None:
    fleet.publish(fleet.status())
    form = {"reason": "tune", "sizing": "balanced", "balanced.gain": "0.7"}
    answer = signed_in("operator").post("/workers/gpu-0/sizing/", form)
    assert (answer.status_code, "did not confirm" in answer.json()["error"]) == (502, True)
    asked, answered = OperatorAction.objects.order_by("id")
    assert asked.action == "replica.sizing"
    assert (asked.before, asked.after["sizing"]) == ({"sizing": "fixed", "params": {}}, "balanced")
    assert asked.after["params"]["gain"] == 0.7
    assert not answered.after["acknowledgements"]["gpu-0"]["ok"]


# History


def history(**query: Any) -> Any:
    return get_json(signed_in(), "operator/history", model="demo", until=NOW.isoformat(), **query)


def test_series_of_seconds_and_of_minutes_tell_the_same_sums(fleet: FleetWriter) -> None:
    BatchRecord.objects.bulk_create(make_batches(1200, end=NOW - timedelta(seconds=1)))
    roll_up(20)
    names = [name for name, metric in METRICS.items() if metric.source == "batch"]
    seconds, minutes = history(span="15m", metric=names), history(span="1h", metric=names)
    assert (seconds["resolution_s"], minutes["resolution_s"]) == (1, 60)
    for name in ("output_tokens", "prompt_tokens", "kv", "utilization", "memory", "batch_size", "preemptions"):
        fine = [value for value in seconds["metrics"][name]["values"] if value is not None]
        coarse = [value for value in minutes["metrics"][name]["values"] if value is not None]
        assert (len(fine), len(coarse)) == (600, 10), name
        assert sum(fine) / 600 == pytest.approx(sum(coarse) / 10, rel=1e-4), name
    assert seconds["metrics"]["power"]["values"][-1] is None
    one = history(span="1h", metric=["output_tokens"], replica="gpu-0")["metrics"]["output_tokens"]["values"][-1]
    assert 0 < one < minutes["metrics"]["output_tokens"]["values"][-1]


def test_a_period_is_compared_with_an_earlier_one_and_marked_with_changes_of_policy(fleet: FleetWriter) -> None:
    RequestRecord.objects.bulk_create(make_requests(600, end=NOW, seconds=3600))
    RequestRecord.objects.bulk_create(make_requests(300, end=NOW - timedelta(days=1), seconds=3600, seed=2))
    roll_up(20)
    assert switch(signed_in("operator"), "fair", "for the chart").status_code == 200
    PolicyRevision.objects.update(created_at=NOW - timedelta(minutes=20))
    found = history(span="1h", compare="day", metric=["completions", "ttft_p99", "attainment"])
    completed = found["metrics"]["completions"]
    assert sum(completed["values"]) * 60 == pytest.approx(573, abs=2)
    assert sum(completed["compared"]) * 60 == pytest.approx(286, abs=2)
    assert all(0.05 < value < 20 for value in found["metrics"]["ttft_p99"]["values"])
    assert set(found["metrics"]["attainment"]["values"]) == {None}
    (change,) = found["changes"]
    assert (change["name"], change["by"], change["when_s"]) == (
        "fair",
        "operator",
        (NOW - timedelta(minutes=20)).timestamp(),
    )
    page = signed_in().get("/history/", {"since": "2026-03-01T11:00", "until": "2026-03-01T12:00"}).content.decode()
    assert "for the chart" in page


def test_days_are_read_from_hours_and_a_period_has_bounds(fleet: FleetWriter) -> None:
    RequestRecord.objects.bulk_create(make_requests(500, end=NOW, seconds=5 * 86_400))
    roll_up(20)
    week = history(span="7d", metric=["completions"])
    assert (week["resolution_s"], len(week["times_s"])) == (3600, 168)
    assert sum(value or 0 for value in week["metrics"]["completions"]["values"]) * 3600 == pytest.approx(476, abs=1)
    client = signed_in()
    for query in (
        {"since": "2026-01-01T00:00:00Z", "until": "2026-09-01T00:00:00Z"},
        {"since": "2026-03-02T00:00:00Z", "until": "2026-03-01T00:00:00Z"},
        {"since": "0001-01-01T00:00:00Z"},
        {"metric": "beauty"},
        {"compare": "dream"},
    ):
        assert client.get("/api/v1/operator/history", {"model": "demo", **query}).status_code == 400, query
    assert client.get("/history/", {"since": "1980-01-01T00:00"}).status_code == 200
    assert client.get("/history/export/", {"since": "1980-01-01T00:00"}).status_code == 400


def test_the_rate_of_a_minute_that_goes_on_is_by_the_seconds_that_it_has_had(fleet: FleetWriter) -> None:
    for minute in (0, 1):
        RequestRollup.objects.create(
            resolution=60, start=NOW + minute * timedelta(minutes=1), model="demo", tenant="a", priority=1, finished=30
        )
    period = choose_period(NOW, NOW + timedelta(minutes=20))
    now_s = (NOW + timedelta(seconds=75)).timestamp()
    series = read_series("demo", period, ["completions"], clock=lambda: now_s)["completions"]
    assert series[:3] == [0.5, 2, None]


def test_the_export_holds_every_metric_and_no_formula(fleet: FleetWriter) -> None:
    BatchRecord.objects.bulk_create(make_batches(120, end=NOW, model="demo"))
    roll_up(20)
    query = {"since": "2026-03-01T11:00", "until": "2026-03-01T12:01", "model": "demo"}
    answer = signed_in().get("/history/export/", query)
    lines = b"".join(answer.streaming_content).decode().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("start,model,replica,output_tokens (tokens/s),completions (requests/s)")
    assert lines[-1].startswith("2026-03-01T12:00:00+00:00,demo,,")
    assert "attachment" in answer.headers["Content-Disposition"]
    assert [*map(safe_cell, ["=1+1", "@x", "plain", -4])] == ["'=1+1", "'@x", "plain", -4]


def test_the_export_of_one_replica_holds_what_that_one_recorded(fleet: FleetWriter) -> None:
    BatchRecord.objects.bulk_create(make_batches(120, end=NOW, model="demo"))
    Replica.objects.create(name="gpu-1", model="demo")
    roll_up(20)
    query = {"since": "2026-03-01T11:00", "until": "2026-03-01T12:01", "model": "demo"}

    def tokens(**more: str) -> float:
        answer = signed_in().get("/history/export/", {**query, **more})
        lines = b"".join(answer.streaming_content).decode().splitlines()  # type: ignore[attr-defined]
        assert {line.split(",")[2] for line in lines[1:]} == {more.get("replica", "")}
        return sum(float(line.split(",")[3]) for line in lines[1:])

    one, two = tokens(replica="gpu-0"), tokens(replica="gpu-1")
    assert min(one, two) > 0
    assert tokens() == pytest.approx(one + two, rel=1e-4)
    page = signed_in().get("/history/", {**query, "replica": "gpu-1"}).content.decode()
    assert "replica=gpu-1" in page.split("/history/export/?")[1].split('"')[0]


# Audit


def test_every_action_is_found_by_who_what_and_when_and_exported(fleet: FleetWriter) -> None:
    operator = signed_in("operator")
    for number in range(3):
        assert switch(operator, "priority", f"=reason {number}", level_s=str(20 + number)).status_code == 200
    record_action(actor=None, action="tenant.update", target="checkout", before={"rpm": 60}, after={"rpm": 90})
    client = signed_in()
    found = get_json(client, "operator/audit", action="policy.", who="operator", limit=2)
    assert [row["reason"] for row in found["actions"]] == ["=reason 2", "=reason 1"]
    assert found["actions"][0]["address"] == "127.0.0.1"
    assert found["actions"][0]["before"] == {"policy": "priority", "params": {"level_s": 21.0}}
    rest = get_json(client, "operator/audit", action="policy.", who="operator", after=found["next_after"])
    assert ([row["reason"] for row in rest["actions"]], rest["next_after"]) == (["=reason 0"], None)
    assert get_json(client, "operator/audit", until="2020-01-01T00:00:00Z")["actions"] == []
    page = client.get("/audit/", {"target": "checkout"}).content.decode()
    assert "<code>rpm</code>" in page
    assert "=reason" not in page
    lines = b"".join(client.get("/audit/export/").streaming_content).decode().splitlines()  # type: ignore[attr-defined]
    assert (len(lines), lines[-1].endswith("'=reason 0")) == (5, True)


# Tenants


def test_a_tenant_sees_its_use_its_budget_and_its_share(fleet: FleetWriter) -> None:
    now = timezone.now()
    for name, weight in (("checkout", 3), ("support", 1)):
        tenant = Tenant.objects.create(name=name, weight=weight)
        Quota.objects.create(tenant=tenant, rpm=60, tpm=10_000, tpd=50_000, concurrency=4)
    ServiceLevel.objects.create(tenant=tenant, priority=1, ttft_ms=1, objective_percent=90)
    limits = TenantLimits(fleet.keys)
    charge: dict[str, Any] = {"rpm": 60, "tpm": 10_000, "concurrency": 4, "tokens": 700, "tpd": 50_000}
    for i in range(3):
        assert execute(fleet.client, limits.acquire("support", f"r{i}", **charge)).ok
    fleet.client.hincrby(fleet.keys.refusals, "demo|support|requests_per_minute", 4)
    fleet.enqueue("support", 1, age_s=5)
    RequestRecord.objects.bulk_create(make_requests(400, end=now, seconds=1800, tenants=("checkout", "support")))
    roll_up(20)
    answer = get_json(signed_in(), "operator/tenants")
    checkout, support = answer["tenants"]
    use = support["use"]
    assert (use["tpd_used"], use["slots"]) == (2100, 3)
    assert (1 <= use["rpm_used"] <= 3, 500 < use["tpm_used"] <= 2100) == (True, True)  # both fill again as time goes
    assert (use["waiting"], checkout["use"]["waiting"]) == (1, 0)
    assert support["refusals"] == {"requests_per_minute": 4}
    hour = support["attainment"]["1h"]
    ended = sum(RequestRollup.objects.filter(resolution=60).values_list("judged", flat=True))
    assert ended > 50
    assert hour["judged"] == ended + 1, "what waits past its target is a miss too"
    assert (hour["met"], hour["share"]) == (0, 0)
    assert hour["budget_left"] == pytest.approx(1 - 1 / 0.1)
    assert checkout["attainment"]["30d"] == {"judged": 0, "met": 0, "share": None, "budget_left": None}
    assert sum(row["service"]["share"] for row in answer["tenants"]) == pytest.approx(1, abs=1e-9)
    services = [row["service"] for row in answer["tenants"]]
    assert services[0]["asked"] == services[0]["tokens"], "nothing of it waits"
    assert services[1]["asked"] > services[1]["tokens"]
    assert answer["jain"] == pytest.approx(1), "each got what it asked, but for one request"
    fleet.enqueue("starving")
    Tenant.objects.create(name="starving")
    answer = get_json(signed_in(), "operator/tenants")
    assert answer["jain"] == pytest.approx(2 / 3, abs=0.01), "who waits and is served nothing counts"
    starving = answer["tenants"][1]["service"]
    assert (starving["tokens"], starving["share"]) == (0, 0)
    assert starving["entitled"] == pytest.approx(starving["asked"] / sum(row["tokens"] for row in services))
    assert "spent 10×" in signed_in().get("/tenants/").content.decode()  # noqa: RUF001


def test_tenants_are_read_on_and_shares_are_among_all_of_them(fleet: FleetWriter) -> None:
    names = [f"tenant-{i}" for i in range(5)]
    Tenant.objects.bulk_create(Tenant(name=name) for name in names)
    RequestRecord.objects.bulk_create(make_requests(100, end=timezone.now(), seconds=1800, tenants=tuple(names[:2])))
    fleet.enqueue("tenant-4", 1)
    roll_up(20)
    client, listed, answers = signed_in(), list[Any](), list[float]()
    after: str | None = ""
    while after is not None:
        answer = get_json(client, f"operator/tenants?limit=2&after={after}")
        assert len(answer["tenants"]) <= 2
        listed += answer["tenants"]
        answers.append(answer["jain"])
        after = answer["next_after"]
    whole = get_json(client, "operator/tenants")
    assert [row["name"] for row in listed] == names
    assert [row["service"] for row in listed] == [row["service"] for row in whole["tenants"]]
    assert (answers, whole["next_after"]) == ([whole["jain"]] * 3, None)
    assert whole["jain"] == pytest.approx(2 / 3, abs=0.01), "one of three who asked was served nothing"
    assert listed[4]["service"]["entitled"] > 0


def test_the_page_of_tenants_has_a_next_one(fleet: FleetWriter) -> None:
    Tenant.objects.bulk_create(Tenant(name=f"tenant-{i:03}") for i in range(MAX_TENANTS + 1))
    first = signed_in().get("/tenants/").content.decode()
    assert "tenant-199" in first
    assert "tenant-200" not in first
    assert 'href="?after=tenant-199"' in first
    second = signed_in().get("/tenants/?after=tenant-199").content.decode()
    assert "tenant-200" in second
    assert "tenant-199</a>" not in second
    assert 'rel="next"' not in second
    assert "There is no tenant yet" not in signed_in().get("/tenants/?after=zzz").content.decode()


def test_pages_are_shown_while_the_queues_store_is_away(installation: Config, settings: Settings) -> None:
    Tenant.objects.create(name="checkout")
    away = installation.model_dump() | {"redis_url": "unix:///nowhere/redis.sock"}
    settings.PENSTOCK = Config.model_construct(**away)
    page = signed_in().get("/tenants/").content.decode()
    assert "does not answer" in page
    assert "checkout" in page
    for path in ("/policies/", "/requests/", "/history/", "/fleet/", "/"):
        assert signed_in().get(path).status_code == 200, path
