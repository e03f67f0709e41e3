"""What the live page's buttons are answered, and that every answer to a person is a sentence."""

import re

import pytest
import redis
from django.contrib.auth.models import Permission, User
from django.template.loader import render_to_string
from django.test import Client

from controlplane.config import Config
from dashboard.templatetags.dashboard import percent
from scheduling.core.policies import POLICIES, build_policy
from scheduling.keys import Keys
from scheduling.models import OperatorAction, PolicyRevision
from scheduling.store import execute
from tests.fleet_data import FleetWriter

pytestmark = pytest.mark.django_db
SWITCH = "/queues/demo/policy/"
FORM = {"policy": "fair", "fair.level_s": "20", "reason": "research crowds out chat"}


def client_with(*codenames: str, csrf: bool = False) -> Client:
    user = User.objects.create_user("olga")
    user.user_permissions.add(*Permission.objects.filter(codename__in=codenames))
    client = Client(enforce_csrf_checks=csrf)
    client.force_login(user)
    return client


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    return writer


def test_every_policy_is_offered_with_its_parameters_and_choices(fleet: FleetWriter) -> None:
    page = client_with("view_policyrevision", "switch_policy").get("/").content.decode()
    for name, kind in POLICIES.items():
        assert f'value="{name}"' in page
        for key, parameter in kind.parameters.items():
            (field,) = re.findall(rf'<(input|select)[^>]*name="{name}\.{key}"', page)
            assert field == ("select" if parameter.choices else "input")
    options = re.search(r'name="hierarchical\.within".*?</select>', page, re.DOTALL)
    assert options is not None
    assert re.findall(r'value="(\w+)"', options[0]) == list(POLICIES["hierarchical"].parameters["within"].choices)
    assert re.findall(r'value="(\w+)"\s+selected', options[0]) == ["priority"]


def test_a_choice_is_switched_to_by_name(fleet: FleetWriter) -> None:
    client = client_with("switch_policy")
    form = {
        "policy": "hierarchical",
        "hierarchical.within": "edf",
        "hierarchical.slack_s": "1.5",
        "reason": "deadlines",
    }
    assert client.post(SWITCH, form).status_code == 200
    active = execute(fleet.client, fleet.queue.active_policy())
    assert active.params == build_policy("hierarchical", {"within": "edf", "slack_s": 1.5}).params
    answer = client.post(SWITCH, form | {"hierarchical.within": "lifo"})
    assert answer.status_code == 400
    assert "within must be one of fifo, priority, edf" in answer.json()["error"]


def test_a_switch_is_in_force_and_recorded_with_its_reason(fleet: FleetWriter) -> None:
    fleet.enqueue("chat")
    answer = client_with("switch_policy").post(SWITCH, FORM)
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "demo", "name": "fair", "revision": 1, "state": "applied", "moved": 1, "confirmed": {},
    }  # fmt: skip
    active = execute(fleet.client, fleet.queue.active_policy())
    assert (active.name, active.revision) == ("fair", 1)
    assert active.params == build_policy("fair", {"level_s": 20}).params
    revision = PolicyRevision.objects.get()
    assert (revision.actor_name, revision.reason) == ("olga", "research crowds out chat")
    assert OperatorAction.objects.get().action == "policy.switch"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reason": "  "}, "Give a reason"),
        ({"reason": "x" * 501}, "Give a reason"),
        ({"policy": "magic"}, "There is no policy 'magic'"),
        ({"fair.level_s": "soon"}, "level_s must be a number"),
        ({"fair.speed": "1"}, "no parameter 'speed'"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_in_a_sentence(
    fleet: FleetWriter, change: dict[str, str], sentence: str
) -> None:
    answer = client_with("switch_policy").post(SWITCH, FORM | change)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]
    assert not PolicyRevision.objects.exists()


def test_a_switch_of_an_unknown_model_or_by_the_wrong_person_changes_nothing(fleet: FleetWriter) -> None:
    assert Client().post(SWITCH, FORM).status_code == 401
    client = client_with("view_policyrevision")
    assert client.post(SWITCH, FORM).status_code == 403
    assert client.post("/workers/gpu-0/pause/", FORM).status_code == 403
    operator = User.objects.get()
    operator.user_permissions.add(Permission.objects.get(codename="switch_policy"))
    assert client.post("/queues/nothing/policy/", FORM).status_code == 404
    assert client.get(SWITCH).status_code == 405
    assert not PolicyRevision.objects.exists()


def test_a_switch_needs_the_token_of_our_own_form(fleet: FleetWriter) -> None:
    answer = client_with("switch_policy", csrf=True).post(SWITCH, FORM)
    assert answer.status_code == 403
    assert "out of date" in answer.content.decode()


def test_a_worker_that_is_not_there_cannot_be_paused(fleet: FleetWriter) -> None:
    client = client_with("control_replica")
    answer = client.post("/workers/gpu-9/pause/", {"reason": "maintenance"})
    assert (answer.status_code, answer.json()["error"]) == (404, "No worker gpu-9 is running.")
    assert client.post("/workers/gpu-9/explode/", {"reason": "why not"}).status_code == 404


def test_the_page_is_for_members_of_a_group_and_hides_what_they_may_not_do() -> None:
    assert Client().get("/").headers["location"] == "/login/?next=/"
    client = client_with()
    assert client.get("/").status_code == 403
    assert client.get("/session/").json() == {"signed_in": True, "may_view": False}
    User.objects.get().user_permissions.add(Permission.objects.get(codename="view_policyrevision"))
    page = client.get("/").content.decode()
    assert "switch-dialog" not in page
    assert "data-control" not in page
    User.objects.get().user_permissions.add(
        *Permission.objects.filter(codename__in=["switch_policy", "control_replica"])
    )
    page = client.get("/").content.decode()
    assert {"fifo", "priority", "fair"} <= set(re.findall(r'name="policy"\s+value="(\w+)"', page))
    assert "data-control" in page


@pytest.mark.parametrize("template", ["403.html", "403_csrf.html", "404.html", "500.html"])
def test_error_pages_need_nothing_but_themselves(template: str) -> None:
    page = render_to_string(template)
    assert "To the dashboard" in page
    assert "Traceback" not in page


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.5, "50 %"), (0.95, "95.0 %"), (0.99999, "99.99 %"), (1, "100 %"), (1.2, "120.00 %"), (None, "\N{EN DASH}")],
)
def test_a_share_that_is_not_the_whole_never_reads_as_it(share: float | None, text: str) -> None:
    assert percent(share) == text
