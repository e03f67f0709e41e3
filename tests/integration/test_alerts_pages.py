"""Alerts for people: the page, the API, the admin, the charts of history and /metrics say the same, and to whom."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from controlplane.config import Config
from controlplane.metric_families import FleetReading, render_metrics
from controlplane.metrics import read_fleet
from dashboard.alerts.models import Alert, AlertChannel, AlertRule, Delivery, Notice
from dashboard.selectors.activity import read_activity
from dashboard.selectors.alerts import count_firing
from dashboard.selectors.service import ServiceWatch
from scheduling.keys import Keys
from scheduling.models import OperatorAction
from tests.fleet_data import FleetWriter
from tests.integration.gateway_support import open_gateway
from tests.integration.test_dashboard_pages import get_json, signed_in

pytestmark = pytest.mark.django_db


@pytest.fixture
def rule(store: redis.Redis, keys: Keys, installation: Config) -> AlertRule:
    FleetWriter(store, keys).deploy()
    AlertRule.objects.all().delete()
    return AlertRule.objects.create(name="Slow steps", kind="step_time", threshold=250, window_s=60, hold_s=120)


def make_alert(rule: AlertRule, *, age_s: float = 60, **values: Any) -> Alert:
    began = timezone.now() - timedelta(seconds=age_s)
    known: dict[str, Any] = {
        "rule": rule, "rule_name": rule.name, "kind": rule.kind, "severity": rule.severity, "model": "demo",
        "state": "firing", "started_at": began, "seen_at": began, "fired_at": began, "value": 412.5, "threshold": 250,
        "reason": "A step took 412 ms. Make batches smaller.",
    }  # fmt: skip
    return Alert.objects.create(**(known | values))


def form(rule: AlertRule, **changes: Any) -> dict[str, Any]:
    known = {
        "threshold": "250", "window_s": "60", "short_window_s": "0", "hold_s": "120", "clear_s": "60",
        "severity": "warning", "model": "", "enabled": "on", "reason": "too noisy",
    }  # fmt: skip
    return known | changes


# The page


def test_the_page_says_what_fires_gravest_first_what_did_and_how_notices_fare(rule: AlertRule) -> None:
    make_alert(rule, subject="b")
    make_alert(rule, severity="critical", subject="a", age_s=5)
    make_alert(rule, state="pending", subject="c", fired_at=None)
    make_alert(rule, state="resolved", subject="d", resolved_at=timezone.now(), ending="Back to 99 ms.")
    channel = AlertChannel.objects.create(name="pager", url="https://hooks.example.org/T0/secret", secret="hush")
    notice = Notice.objects.create(event="test", payload={}, created_at=timezone.now())
    Delivery.objects.create(notice=notice, channel=channel, next_try_at=timezone.now(), error="status 500")
    page = signed_in().get("/alerts/").content.decode()
    assert page.index(">a on demo<") < page.index(">b on demo<") < page.index(">c on demo<") < page.index(">d on demo<")
    for said in (
        "412.5",
        "over 250",
        "Make batches smaller",
        "Back to 99 ms.",
        "https://hooks.example.org/…",
        "status 500",
    ):
        assert said in page
    for hidden in ("secret", "hush", "Acknowledge…", "Change…", "rule-dialog"):
        assert hidden not in page
    assert "Acknowledge…" in signed_in("operator").get("/alerts/").content.decode()


def test_what_resolved_is_read_on_from_where_a_page_ended(rule: AlertRule) -> None:
    for i in range(30):
        make_alert(rule, age_s=i, state="resolved", subject=f"t{i:02}", resolved_at=timezone.now())
    page = signed_in().get("/alerts/").content.decode()
    assert "t24 on" in page
    assert "t25 on" not in page
    older = page.split('rel="next"')[0].rsplit('href="', 1)[1].split('"')[0]
    assert "t25 on" in signed_in().get(f"/alerts/{older}").content.decode()


def test_every_page_and_the_feed_count_what_fires(rule: AlertRule) -> None:
    assert "hidden" in signed_in().get("/audit/").content.decode().split('id="firing"')[1].split(">")[0]
    first = make_alert(rule, subject="a")
    make_alert(rule, subject="b", acknowledged_at=timezone.now())
    sign = signed_in().get("/audit/").content.decode().split('id="firing"')[1].split("</a>")[0]
    assert 'data-unacknowledged="1"' in sign
    assert "<b>2</b>" in sign
    told = read_activity(ServiceWatch()).document()["alerts"]
    assert told == count_firing()
    assert (told["firing"], told["unacknowledged"], told["newest"]) == (2, 1, first.pk + 1)


def test_an_operator_acknowledges_with_a_note_and_the_trail_keeps_it(rule: AlertRule) -> None:
    alert = make_alert(rule, subject="gpu-0")
    path = f"/alerts/{alert.pk}/acknowledge/"
    assert signed_in().post(path, {"note": "mine"}).status_code == 403
    answer = signed_in("operator").post(path, {"note": "fan is broken\0"})
    assert answer.json()["message"] == "You have acknowledged Slow steps: gpu-0 on demo."
    alert.refresh_from_db()
    assert (alert.acknowledged_by, alert.note, alert.state) == ("operator", "fan is broken", "firing")
    row = OperatorAction.objects.get(action="alert.acknowledge")
    assert (row.actor_name, row.target, row.reason) == ("operator", "Slow steps: gpu-0 on demo", "fan is broken")
    Alert.objects.update(state="resolved")
    assert signed_in("operator").post(path, {}).status_code == 409
    assert signed_in("operator").post(path.replace(str(alert.pk), "999999"), {}).status_code == 404
    assert signed_in("operator").post(path, {"note": "x" * 501}).status_code == 400


def test_an_operator_changes_a_rule_with_a_reason_and_the_trail_keeps_what_differs(rule: AlertRule) -> None:
    path = f"/alerts/rules/{rule.pk}/"
    assert signed_in().post(path, form(rule)).status_code == 403
    assert signed_in("operator").post(path, form(rule, reason="")).status_code == 400
    changed = form(rule, threshold="300", hold_s="30", enabled="")
    assert signed_in("operator").post(path, changed).status_code == 200
    rule.refresh_from_db()
    assert (rule.threshold, rule.hold_s, rule.enabled, rule.window_s) == (300, 30, False, 60)
    row = OperatorAction.objects.get(action="alertrule.update")
    assert row.before == {"threshold": 250, "hold_s": 120, "enabled": True}
    assert row.after == {"threshold": 300, "hold_s": 30, "enabled": False}
    assert (row.target, row.reason) == ("Slow steps", "too noisy")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"threshold": "much"}, "threshold"), ({"threshold": "nan"}, "threshold"), ({"threshold": "-1"}, "threshold"),
        ({"window_s": "1"}, "window_s"), ({"window_s": "9" * 30}, "window_s"), ({"hold_s": "-5"}, "hold_s"),
        ({"severity": "dire"}, "severity"), ({"model": "x" * 200}, "model"), ({"model": "demmo"}, "model"),
        ({"short_window_s": "60"}, "short_window_s"),
    ],
)  # fmt: skip
def test_what_a_rule_cannot_be_is_said_at_its_field_and_nothing_is_changed(
    rule: AlertRule, change: dict[str, str], field: str
) -> None:
    answer = signed_in("operator").post(f"/alerts/rules/{rule.pk}/", form(rule, clear_s="7", **change))
    assert (answer.status_code, list(answer.json()["fields"])) == (400, [field])
    rule.refresh_from_db()
    assert rule.clear_s == 60
    assert not OperatorAction.objects.exists()


# The API


def call(client: Client, method: str, path: str, body: object) -> Any:
    return client.generic(method, f"/api/v1/{path}", httpx.Request("POST", "http://x", json=body).content.decode(),
                          content_type="application/json")  # fmt: skip


def test_alerts_are_filtered_and_read_page_by_page(rule: AlertRule) -> None:
    for i in range(5):
        make_alert(rule, age_s=100 - i, subject=f"t{i}", severity="critical" if i % 2 else "warning")
    make_alert(rule, state="resolved", subject="old", age_s=4000, resolved_at=timezone.now())
    first = get_json(signed_in(), "alerts", state="firing", limit=3)
    assert [row["subject"] for row in first["alerts"]] == ["t4", "t3", "t2"]
    rest = get_json(signed_in(), "alerts", state="firing", after=first["next_after"])
    assert [row["subject"] for row in rest["alerts"]] == ["t1", "t0"]
    assert rest["next_after"] is None
    assert len(get_json(signed_in(), "alerts", severity="critical")["alerts"]) == 2
    assert len(get_json(signed_in(), "alerts", subject="old", rule="Slow steps", model="demo")["alerts"]) == 1
    since = (timezone.now() - timedelta(hours=1)).isoformat()
    assert len(get_json(signed_in(), "alerts", since=since)["alerts"]) == 5
    assert signed_in().get("/api/v1/alerts", {"state": "loud"}).status_code == 400
    assert signed_in().get("/api/v1/alerts", {"after": "x"}).status_code == 400


def test_the_api_acknowledges_and_changes_rules_for_operators(rule: AlertRule) -> None:
    alert = make_alert(rule)
    operator = signed_in("operator")
    assert call(signed_in(), "POST", f"alerts/{alert.pk}/acknowledge", {}).status_code == 403
    assert call(operator, "POST", f"alerts/{alert.pk}/acknowledge", {"note": "mine"}).json()["note"] == "mine"
    assert call(operator, "POST", f"alerts/{2**63}/acknowledge", {}).status_code == 404
    (told,) = get_json(signed_in(), "alert-rules")
    assert (told["threshold"], told["unit"], told["falls"], told["firing"]) == (250, "ms", False, 1)
    assert call(signed_in(), "PATCH", f"alert-rules/{rule.pk}", {"reason": "x"}).status_code == 403
    answer = call(operator, "PATCH", f"alert-rules/{rule.pk}", {"threshold": 99, "reason": "stricter"})
    assert (answer.json()["threshold"], answer.json()["hold_s"]) == (99, 120)
    refused = call(operator, "PATCH", f"alert-rules/{rule.pk}", {"window_s": 901, "reason": "longer"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "window_s")
    assert call(operator, "PATCH", "alert-rules/0", {"reason": "x"}).status_code == 404
    Alert.objects.update(state="resolved")
    refused = call(operator, "POST", f"alerts/{alert.pk}/acknowledge", {})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "alert_not_firing")


def test_channels_are_told_without_their_secrets(rule: AlertRule) -> None:
    AlertChannel.objects.create(name="pager", url="https://hooks.example.org:8443/T0/secret", secret="hush")
    (told,) = get_json(signed_in(), "alert-channels")
    assert (told["target"], told["waiting"]) == ("https://hooks.example.org:8443/…", 0)
    assert "hush" not in str(told)


# History and metrics


def test_history_marks_what_fired_in_the_period_or_before_and_still_did(rule: AlertRule) -> None:
    make_alert(rule, subject="long", age_s=86_400)
    make_alert(rule, subject="now")
    make_alert(rule, subject="elsewhere", model="other")
    make_alert(rule, subject="pending", state="pending", fired_at=None)
    ended = timezone.now() - timedelta(hours=3)
    make_alert(rule, subject="old", state="resolved", age_s=20_000, resolved_at=ended)
    told = get_json(signed_in(), "operator/history", model="demo", span="1h")
    assert [mark["subject"] for mark in told["alerts"]] == ["long", "now"]
    page = signed_in().get("/history/", {"span": "1h"}).content.decode()
    assert page.count("Make batches smaller") == 2


def test_metrics_show_what_fires_by_rule_and_nothing_where_nobody_judges() -> None:
    def gauges(alerts: list[tuple[str, str, int]] | None) -> list[tuple[dict[str, str], float]]:
        text = render_metrics(FleetReading(redis_up=True, models={}, refusals={}, alerts=alerts)).decode()
        families = [f for f in text_string_to_metric_families(text) if f.name == "penstock_alerts_firing"]
        return [(sample.labels, sample.value) for family in families for sample in family.samples]

    told = [({"rule": "Long queue", "severity": "warning"}, 2.0)]
    assert gauges([("Long queue", "warning", 2)]) == told
    assert gauges(None) == []


async def test_a_scrape_reads_what_the_ops_worker_left(redis_url: str, keys: Keys, tmp_path: Path) -> None:
    async with open_gateway(redis_url, keys, tmp_path) as gateway:
        assert (await read_fleet(gateway, [])).alerts is None
        with redis.Redis.from_url(redis_url) as client:
            client.set(keys.alerts, '[["Long queue", "warning", 3]]')
        assert (await read_fleet(gateway, [])).alerts == [("Long queue", "warning", 3)]


# The admin


@pytest.fixture
def admin(rule: AlertRule) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("ada", password="x"))
    return client


CHANNEL = {"name": "pager", "enabled": "on", "kind": "webhook", "min_severity": "info", "recipients": ""}
URL = "https://hooks.example.org/T0/private"


def errors(answer: Any) -> str:
    return "" if answer.status_code == 302 else str(answer.context["adminform"].form.errors)


def test_a_channel_that_has_sent_is_kept_with_what_it_sent_and_the_admin_says_so(admin: Client) -> None:
    path = "/admin/dashboard/alertchannel/"
    channel = AlertChannel.objects.create(name="pager", url=URL)
    notice = Notice.objects.create(event="test", payload={}, created_at=timezone.now())
    Delivery.objects.create(notice=notice, channel=channel, next_try_at=timezone.now())
    one, many = f"{path}{channel.pk}/delete/", {"action": "delete_selected", "_selected_action": [channel.pk]}
    for asked in (admin.get(one), admin.post(path, many | {"reason": "old"})):
        page = asked.content.decode()
        assert "Turn the channel off instead" in page
        assert "permission" not in page
    admin.post(one, {"post": "yes", "reason": "old"})
    admin.post(path, many | {"post": "yes", "reason": "old"})
    assert Delivery.objects.get().channel == channel


def test_a_channel_is_made_tried_and_its_secret_is_neither_shown_nor_lost_nor_in_the_trail(admin: Client) -> None:
    path = "/admin/dashboard/alertchannel/"
    assert errors(admin.post(f"{path}add/", CHANNEL | {"url": URL, "secret": "hush"})) == ""
    channel = AlertChannel.objects.get()
    assert channel.secret == "hush"
    edit = f"{path}{channel.pk}/change/"
    page = admin.get(edit).content.decode()
    assert URL in page
    assert "hush" not in page
    assert errors(admin.post(edit, CHANNEL | {"url": f"{URL}/2", "secret": "", "reason": "it moved"})) == ""
    channel.refresh_from_db()
    assert (channel.secret, channel.url) == ("hush", f"{URL}/2")
    assert errors(admin.post(edit, CHANNEL | {"url": URL, "unsigned": "on", "reason": "an old one"})) == ""
    channel.refresh_from_db()
    assert channel.secret == ""
    admin.post(path, {"action": "send_test", "_selected_action": [channel.pk], "reason": "does it arrive?"})
    assert Delivery.objects.get().notice.event == "test"
    unused = AlertChannel.objects.create(name="unused", url=URL, secret="hush")
    assert admin.post(f"{path}{unused.pk}/delete/", {"post": "yes", "reason": "no more"}).status_code == 302
    trail = list(OperatorAction.objects.order_by("id").values_list("action", "reason"))
    assert trail == [
        ("alertchannel.create", ""), ("alertchannel.update", "it moved"), ("alertchannel.update", "an old one"),
        ("alertchannel.test", "does it arrive?"), ("alertchannel.delete", "no more"),
    ]  # fmt: skip
    kept = str(list(OperatorAction.objects.values("before", "after")))
    assert "hush" not in kept
    assert "private" not in kept


def test_who_may_only_look_at_channels_sees_no_secret(rule: AlertRule, client: Client) -> None:
    channel = AlertChannel.objects.create(name="pager", url=URL, secret="hush")
    watcher = User.objects.create_user("vera", is_staff=True)
    watcher.user_permissions.set(Permission.objects.filter(codename__in=["view_alertchannel", "use_admin"]))
    client.force_login(watcher)
    page = client.get(f"/admin/dashboard/alertchannel/{channel.pk}/change/").content.decode()
    assert "hooks.example.org" in page
    assert "hush" not in page
    assert "private" not in page


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"url": "file:///etc/passwd"}, "begins with https"),
        ({"url": "https://me:pw@example.org/"}, "user name or password"),
        ({"url": ""}, "begins with https"),
        ({"kind": "email", "recipients": "ops@example.org"}, "PENSTOCK_EMAIL_HOST"),
    ],
)
def test_a_channel_that_cannot_work_is_explained(admin: Client, form: dict[str, str], said: str) -> None:
    assert said in errors(admin.post("/admin/dashboard/alertchannel/add/", CHANNEL | form))


def test_a_rule_is_made_explained_changed_and_deleted_in_the_admin(admin: Client) -> None:
    path = "/admin/dashboard/alertrule/"
    wanted = {
        "name": "Dear steps", "enabled": "on", "kind": "step_time", "severity": "critical", "threshold": "90",
        "model": "", "window_s": "5", "short_window_s": "0", "hold_s": "10", "clear_s": "10",
    }  # fmt: skip
    assert "15 to 900 seconds" in errors(admin.post(f"{path}add/", wanted))
    assert "required" in errors(admin.post(f"{path}add/", wanted | {"threshold": ""}))
    assert errors(admin.post(f"{path}add/", wanted | {"window_s": "30"})) == ""
    made = AlertRule.objects.get(name="Dear steps")
    assert errors(admin.post(f"{path}{made.pk}/change/", wanted | {"window_s": "40", "reason": "calmer"})) == ""
    assert admin.post(f"{path}{made.pk}/delete/", {"post": "yes", "reason": "unused"}).status_code == 302
    trail = list(OperatorAction.objects.order_by("id").values_list("action", flat=True))
    assert trail == ["alertrule.create", "alertrule.update", "alertrule.delete"]


def test_every_admin_page_opens_and_a_given_up_delivery_is_tried_again(admin: Client, rule: AlertRule) -> None:
    channel = AlertChannel.objects.create(name="pager", url=URL)
    when = datetime(2026, 3, 1, tzinfo=UTC)
    notice = Notice.objects.create(alert=make_alert(rule), event="firing", payload={}, created_at=when)
    delivery = Delivery.objects.create(notice=notice, channel=channel, next_try_at=when, state="given up")
    for row in (rule, channel, notice.alert, delivery):
        assert row is not None
        path = f"/admin/dashboard/{row._meta.model_name}/"
        assert admin.get(path).status_code == 200
        assert admin.get(f"{path}{row.pk}/change/").status_code == 200
    again = {"action": "again", "_selected_action": [delivery.pk], "reason": "it is back"}
    admin.post("/admin/dashboard/delivery/", again)
    delivery.refresh_from_db()
    assert delivery.state == "waiting"
