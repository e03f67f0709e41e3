"""What the admin's lists and pages say, and that a list asks the database no more for more rows."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from django.conf import settings
from django.contrib import admin as django_admin
from django.contrib.auth.models import Group, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils.html import strip_tags
from django.utils.text import capfirst

from controlplane.models import OperatorToken
from dashboard.alerts.models import Alert, AlertChannel, AlertRule, Delivery, Notice
from inference.models import ModelDeployment, Replica, RequestRecord, WantedReplica
from inference.records import make_row
from scheduling import services
from scheduling.models import ApiKey, OperatorAction, PolicyRevision, ServiceLevel
from tests.integration.test_historian import batch_event, request_event

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]
NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
TABLES = [model for model in django_admin.site._registry if model._meta.app_label != "auth"] + [User]


@pytest.fixture
def admin(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ada", password="x"))
    return client


def add_rows(number: int) -> None:
    """A row of every table, and what it points to."""
    tenant = services.create_tenant(name=f"tenant-{number}", rpm=60)
    ApiKey.objects.create(tenant=tenant, name="app", prefix=f"key{number}", digest=f"digest{number}")
    ServiceLevel.objects.create(tenant=tenant, priority=3, ttft_ms=200)
    model = ModelDeployment.objects.create(name=f"model-{number}", path="/models/demo", num_parameters=5_000_000)
    Replica.objects.create(name=f"gpu-{number}", state="ready")
    WantedReplica.objects.create(name=f"gpu-{number}", deployment=model, machine="m")
    make_row(request_event(f"r{number}")).save()
    make_row(batch_event(1_760_000_000 + number)).save()
    PolicyRevision.objects.create(
        model="demo",
        revision=number,
        name="priority_aging",
        params={"aging_s": 30.0},
        acknowledgements={"gpu-0": {"ok": True}},
    )
    rule = AlertRule.objects.create(name=f"rule {number}", kind="queue", threshold=100)
    alert = Alert.objects.create(
        rule=rule, rule_name=rule.name, kind=rule.kind, severity="warning", model="demo", state="firing",
        started_at=NOW, seen_at=NOW, value=123.456789, threshold=100,
    )  # fmt: skip
    channel = AlertChannel.objects.create(name=f"channel {number}", url="https://example.com/secret")
    notice = Notice.objects.create(alert=alert, event="firing", payload={}, created_at=NOW)
    Delivery.objects.create(notice=notice, channel=channel, next_try_at=NOW)
    user = User.objects.create_user(f"user{number}")
    user.groups.add(Group.objects.get(name="viewer"))
    OperatorToken.objects.create(user=user, name="script", prefix=f"op{number}", digest=f"digest{number}")


def list_of(model: Any) -> str:
    return f"/admin/{model._meta.app_label}/{model._meta.model_name}/"


def text_of(admin: Client, url: str) -> str:
    """The page as it is read, in one line."""
    response = admin.get(url)
    assert response.status_code == 200
    return re.sub(r"\s+", " ", strip_tags(response.content.decode()))


def page_of(admin: Client, model: Any) -> str:
    """The first row's own page."""
    return text_of(admin, f"{list_of(model)}{model.objects.first().pk}/change/")


def num_queries(admin: Client, url: str) -> int:
    with CaptureQueriesContext(connection) as queries:
        assert admin.get(url).status_code == 200
    return len(queries)


def test_no_list_asks_the_database_more_for_more_rows(admin: Client) -> None:
    add_rows(1)
    for model in TABLES:
        admin.get(list_of(model))  # what is looked up once is
    few = {model: num_queries(admin, list_of(model)) for model in TABLES}
    for number in range(2, 7):
        add_rows(number)
    assert {model: num_queries(admin, list_of(model)) for model in TABLES} == few


def test_a_page_is_called_what_the_side_bar_calls_it() -> None:
    theme: Any = settings.UNFOLD
    items = [item for group in theme["SIDEBAR"]["navigation"] for item in group["items"]]
    titles = {str(item["link"]): item["title"] for item in items}
    models = [model for model in django_admin.site._registry if list_of(model) in titles]
    assert len(models) == len(titles) - 1, "all but the dashboard"
    for model in models:
        assert titles[list_of(model)] == capfirst(str(model._meta.verbose_name_plural))


def test_the_audit_trail_speaks_no_python(admin: Client) -> None:
    actor = User.objects.get(username="ada")
    tenant = services.create_tenant(name="acme")
    services.suspend_tenant(tenant=tenant, actor=actor, reason="not paid")
    services.update_tenant(tenant=tenant, actor=actor, rpm=5)
    listed = text_of(admin, list_of(OperatorAction))
    assert "suspended no → yes" in listed
    assert "rpm none → 5" in listed
    shown = text_of(admin, f"{list_of(OperatorAction)}{OperatorAction.objects.get(action='tenant.suspend').pk}/change/")
    assert "suspended yes" in shown
    assert not re.search(r"\b(True|False|None)\b", listed + shown)


def test_an_alert_has_its_unit_and_a_delivery_its_alert(admin: Client) -> None:
    add_rows(1)
    for page in (text_of(admin, list_of(Alert)), page_of(admin, Alert)):
        assert "123.5 requests" in page
        assert "over 100 requests" in page
    delivery, notice = page_of(admin, Delivery), Notice.objects.get()
    assert "rule 1: demo" in delivery
    assert "2026-05-04 03:02:01" in delivery
    assert str(notice.pk) not in delivery


def test_a_checkpoints_deployment_is_shown_in_its_own_words(admin: Client) -> None:
    add_rows(1)
    page = page_of(admin, ModelDeployment)
    assert "Path /models/demo" in page
    assert "Max batch size 16" in page
    assert "Tokenizer" not in page


def test_a_switch_and_a_token_are_shown_whole(admin: Client) -> None:
    add_rows(1)
    switch = page_of(admin, PolicyRevision)
    assert "fifo → priority_aging" in switch
    assert "aging_s 30" in switch
    assert "gpu-0 ok yes" in switch
    token = page_of(admin, OperatorToken)
    assert "pso-op1-…" in token
    assert "Status active" in token


def test_a_request_links_to_its_page_on_the_dashboard(admin: Client) -> None:
    add_rows(1)
    url = f"{list_of(RequestRecord)}{RequestRecord.objects.get().pk}/change/"
    assert 'href="/requests/r1/"' in admin.get(url).content.decode()
