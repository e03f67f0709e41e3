"""The operator's pages and the API beside them: what they show, to whom, and in which zone."""

from datetime import UTC, datetime
from typing import Any

import pytest
import redis
from django.contrib.auth.models import Group, User
from django.test import Client

from controlplane.config import Config
from dashboard.page import PAGES
from scheduling.keys import Keys
from scheduling.models import PolicyRevision
from tests.fleet_data import FleetWriter

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
    first = get_json(signed_in(), "policies/revisions", model="demo", limit=10)
    assert [row["revision"] for row in first["revisions"]] == list(range(17, 7, -1))
    rest = get_json(signed_in(), "policies/revisions", model="demo", before=first["next_before"])
    assert [row["revision"] for row in rest["revisions"]] == list(range(7, 0, -1))
    assert rest["next_before"] is None
    assert rest["revisions"][0]["previous_params"] == {"level_s": 15.0}
    assert (rest["revisions"][0]["by"], rest["revisions"][0]["reason"]) == ("operator", "try 6")


@pytest.mark.parametrize("path", ["policies/revisions?model=demo"])
def test_the_api_of_pages_is_for_viewers(fleet: FleetWriter, path: str) -> None:
    assert Client().get(f"/api/v1/{path}").status_code == 401
    assert signed_in("").get(f"/api/v1/{path}").status_code == 403
    assert signed_in().get(f"/api/v1/{path}").status_code == 200
