"""Tenants as files: what is exported comes back as it was, and an import says what it would do before it does it."""

import json
import re
from contextlib import suppress
from typing import Any

import pytest
import redis
from django.contrib.auth.models import Group, User
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from hypothesis import given
from hypothesis import strategies as st

from controlplane.config import Config
from scheduling.models import OperatorAction, Quota, ServiceLevel, Tenant
from scheduling.services import create_key, create_tenant
from scheduling.tenant_files import FileError, read_current, read_file, write_csv, write_json
from scheduling.tenant_import import plan_import

pytestmark = pytest.mark.django_db
ADDRESS = "/admin/scheduling/tenant/import/"


@pytest.fixture
def client(store: redis.Redis, installation: Config) -> Client:
    user = User.objects.create_user("ada")
    user.groups.add(Group.objects.get(name="administrator"))
    made = Client()
    made.force_login(user)
    return made


def make_tenants() -> None:
    acme = create_tenant(name="acme", display_name='=Acme, "Ltd"', weight=2.5, rpm=60, tpd=10_000, max_priority=1)
    ServiceLevel.objects.create(tenant=acme, priority=2, ttft_ms=300, tpot_ms=50, objective_percent=99.5)
    ServiceLevel.objects.create(tenant=acme, priority=5, e2e_ms=60_000)
    create_tenant(name="plain")
    create_key(tenant=acme)


def try_file(client: Client, content: str | bytes) -> Any:
    raw = content.encode() if isinstance(content, str) else content
    return client.post(ADDRESS, {"file": SimpleUploadedFile("tenants.csv", raw)}, follow=True)


def confirm(client: Client, page: str, reason: str = "the new year's quotas") -> Any:
    hidden = dict(re.findall(r'name="(content|digest)" value="([^"]+)"', page))
    return client.post(ADDRESS, {**hidden, "reason": reason}, follow=True)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_an_export_has_no_secret_and_changes_nothing_when_it_comes_back(client: Client, ending: str) -> None:
    make_tenants()
    response = client.get(f"/admin/scheduling/tenant/export-{ending}", follow=True)
    text = response.content.decode()
    assert "attachment" in response.headers["Content-Disposition"]
    assert "ps-" not in text
    assert "digest" not in text
    plan = plan_import(text.encode())
    assert (plan.changes, plan.problems, plan.num_same) == ([], [], 2)
    before = read_current()
    Tenant.objects.all().delete()
    page = try_file(client, text).content.decode()
    assert "(new)" in page
    assert not Tenant.objects.exists(), "it only shows"
    confirm(client, page)
    assert read_current() == before


def test_an_import_shows_old_and_new_keeps_what_the_file_does_not_name_and_is_audited(client: Client) -> None:
    make_tenants()
    levels = '[{""priority"": ""high"", ""ttft_ms"": 200}]'
    page = try_file(client, f'name,weight,rpm,suspended,service_levels\nacme,3,,yes,"{levels}"\nnew,1,10,,\n')
    shown = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.content.decode()))
    assert "weight: 2.5 → 3" in shown
    assert "rpm: 60 → none" in shown
    assert "new (new)" in shown
    assert "Import 2 tenants" in shown
    done = confirm(client, page.content.decode())
    assert "1 tenants made, 1 changed, 0 as they were." in done.content.decode()
    acme = Tenant.objects.get(name="acme")
    assert (acme.weight, acme.suspended, acme.quota.rpm, acme.quota.tpd) == (3.0, True, None, 10_000)
    assert [(level.priority, level.ttft_ms) for level in acme.service_levels.all()] == [(2, 200)]
    assert acme.keys.filter(revoked_at=None).count() == 1
    assert Quota.objects.get(tenant__name="new").rpm == 10
    trail = OperatorAction.objects.filter(actor_name="ada").order_by("id").values_list("action", "target", "reason")
    why = "the new year's quotas"
    assert list(trail) == [
        ("tenant.update", "acme", why), ("tenant.suspend", "acme", why), ("servicelevel.update", "acme", why),
        ("tenant.create", "new", why),
    ]  # fmt: skip


def test_each_fault_is_named_by_line_and_field_and_nothing_is_imported(client: Client) -> None:
    rows = [
        "name,weight,rpm,max_priority,service_levels",
        "Upper Case,1,,,",
        "heavy,5000,,,",
        "odd,nan,1.5,urgent,x",
        "twice,,,,",
        "twice,,,,",
        'empty,,,,"[{""priority"": ""low""}]"',
        "fine,,0,,",
    ]
    page = try_file(client, "\n".join(rows)).content.decode()
    cells = re.findall(r'<td class="p-3">(.*?)</td>', page)
    found = [tuple(cells[at : at + 2]) for at in range(0, len(cells) - 2, 3)]
    assert found[:8] == [
        ("2", "name"), ("3", "weight"), ("4", "weight"), ("4", "rpm"), ("4", "max_priority"), ("4", "service_levels"),
        ("6", "name"), ("7", "service_levels"),
    ]  # fmt: skip
    assert found[8] == ("8", "rpm")
    assert "A weight is at most 1000." in page
    assert "Import " not in page.split("What would change")[1]
    assert not Tenant.objects.exists()


def test_what_changed_since_it_was_shown_is_shown_again(client: Client) -> None:
    make_tenants()
    page = try_file(client, "name,weight\nacme,3\n").content.decode()
    Tenant.objects.filter(name="acme").update(weight=7)
    again = confirm(client, page).content.decode()
    assert "have changed since this was shown" in again
    assert "7 → " in again
    assert Tenant.objects.get(name="acme").weight == 7
    assert confirm(client, page, reason="").status_code == 200
    assert Tenant.objects.get(name="acme").weight == 7


def test_files_that_are_none_are_refused_in_a_sentence(client: Client) -> None:
    for content in (
        "",
        "\0",
        b"\xff\xfe",
        "[",
        '{"tenants": 3}',
        "who,what\n1,2\n",
        "name\n",
        "[" * 5000,
        "x" * 1_000_001,
    ):
        page = try_file(client, content).content.decode()
        assert "errorlist" in page or "text-red" in page, content[:20]
    assert client.post(ADDRESS, {"digest": "x", "content": "@@"}, follow=True).status_code == 200


def test_only_who_may_change_tenants_may_import(client: Client) -> None:
    other = Client()
    user = User.objects.create_user("olga", is_staff=True)
    user.groups.add(Group.objects.get(name="operator"))
    other.force_login(user)
    assert try_file(other, "name\nmine\n").status_code == 403
    assert not Tenant.objects.exists()


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(str.encode)
    | st.builds(
        lambda rows: json.dumps(rows).encode(),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["name", "rpm", "service_levels", "weight", "tenants", "priority"]), inner
                )
            ),
            max_leaves=8,
        ),
    )
)
def test_no_file_breaks_the_reader(content: bytes) -> None:
    with suppress(FileError):
        read_file(content)


def test_written_files_are_read_back_whole() -> None:
    make_tenants()
    for text in (write_csv(read_current()), write_json(read_current())):
        assert {entry.values["name"]: entry.values for entry in read_file(text.encode())} == read_current()
