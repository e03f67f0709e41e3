"""The audit trail: every change of operators and administrators, with why, from what, from where; rows for good."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from django.contrib.auth.models import Group, Permission, User
from django.contrib.messages import get_messages
from django.db import DatabaseError, connection
from django.test import Client

from controlplane.config import Config
from controlplane.tokens import create_token
from scheduling import services
from scheduling.keys import Keys
from scheduling.models import OperatorAction, ServiceLevel, Tenant
from scheduling.store import execute
from tests.fleet_data import FleetWriter

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]

TRIGGERS = import_module("scheduling.migrations.0007_append_only_audit_trail")
TABLE = OperatorAction._meta.db_table
FORBIDDEN = r"never changed or deleted"


@pytest.fixture
def admin(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ada", password="x"))
    return client


@pytest.fixture
def fleet(store: redis.Redis, keys: Keys, installation: Config) -> FleetWriter:
    writer = FleetWriter(store, keys)
    writer.deploy()
    return writer


@pytest.fixture
def acme() -> Tenant:
    """As `acme` in everything that counts, and with the name of another to look at."""
    services.create_tenant(name="other", display_name="Acme")
    return services.create_tenant(name="acme", display_name="Acme", weight=2.0, rpm=60)


def operator() -> User:
    user = User.objects.create_user("olga")
    user.groups.add(Group.objects.get(name="operator"))
    return user


def latest(action: str) -> OperatorAction:
    row: OperatorAction = OperatorAction.objects.filter(action=action).latest("id")
    return row


def run_sql(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


@contextmanager
def as_migrated() -> Iterator[None]:
    """With the trigger that tests on SQLite do without."""
    if connection.vendor != "sqlite":
        yield
        return
    schema_editor: Any = SimpleNamespace(connection=connection, execute=run_sql)
    for name in TRIGGERS.EVENTS:
        run_sql(f"DROP TRIGGER IF EXISTS {name}")
    TRIGGERS.make_triggers(None, schema_editor)
    try:
        yield
    finally:
        run_sql(f"DROP TRIGGER {TABLE}_undeleted")


@contextmanager
def unwritable_trail() -> Iterator[None]:
    run_sql(f"ALTER TABLE {TABLE} RENAME TO {TABLE}_away")
    try:
        yield
    finally:
        run_sql(f"ALTER TABLE {TABLE}_away RENAME TO {TABLE}")


def test_the_database_itself_keeps_every_row_as_it_was_written() -> None:
    olga = operator()
    services.create_tenant(name="acme", actor=olga)
    row = OperatorAction.objects.get()
    with as_migrated():
        for field in ("reason", "actor_name", "token"):
            with pytest.raises(DatabaseError, match=FORBIDDEN):
                run_sql(f"UPDATE {TABLE} SET {field} = 'rewritten'")
        with pytest.raises(DatabaseError, match=FORBIDDEN):
            run_sql(f"UPDATE {TABLE} SET actor_id = {User.objects.create_user('somebody').pk}")
        with pytest.raises(DatabaseError, match=FORBIDDEN):
            run_sql(f"DELETE FROM {TABLE}")
        olga.delete()
    kept = OperatorAction.objects.get()
    assert (kept.pk, kept.actor, kept.actor_name, kept.reason) == (row.pk, None, "olga", row.reason)


def test_what_was_done_by_a_token_says_so(fleet: FleetWriter) -> None:
    token, plaintext = create_token(user=operator(), name="deploy")
    waiting, other = fleet.enqueue("chat"), fleet.enqueue("chat")
    path, body = "/api/v1/operator/requests/{}/cancel", json.dumps({"reason": "runaway"})
    by_token = Client(headers={"Authorization": f"Bearer {plaintext}"})
    assert by_token.post(path.format(waiting), body, content_type="application/json").status_code == 200
    row = latest("request.cancel")
    assert (row.actor_name, row.address, row.token) == ("olga", "127.0.0.1", token.prefix)
    session = Client()
    session.force_login(User.objects.get(username="olga"))
    assert session.post(f"/requests/{other}/cancel/", {"reason": "runaway"}).status_code == 200
    assert latest("request.cancel").token == ""
    assert f"token {token.prefix}" in session.get("/audit/").content.decode()
    (*_, first) = session.get("/api/v1/operator/audit", {"action": "request.cancel"}).json()["actions"]
    assert first["token"] == token.prefix


def test_a_cancel_that_cannot_be_written_down_is_not_done_and_can_be_repeated(fleet: FleetWriter) -> None:
    waiting = fleet.enqueue("chat")
    client = Client()
    client.force_login(operator())
    with unwritable_trail():
        answer = client.post(f"/requests/{waiting}/cancel/", {"reason": "runaway"})
        assert (answer.status_code, "nothing was changed" in answer.json()["error"]) == (503, True)
    assert execute(fleet.client, fleet.queue.snapshot()).depth == 1
    assert client.post(f"/requests/{waiting}/cancel/", {"reason": "runaway"}).json()["was"] == "queued"
    row = latest("request.cancel")
    assert (row.before, row.after["state"], row.after["tenant"]) == ({"state": "queued"}, "cancelled", "chat")


def test_a_command_to_a_worker_is_written_down_before_it_is_sent(fleet: FleetWriter) -> None:
    fleet.publish(fleet.status())
    client = Client()
    client.force_login(operator())
    with unwritable_trail():
        assert client.post("/workers/gpu-0/pause/", {"reason": "tune"}).status_code == 503
    assert not OperatorAction.objects.exists()
    client.post("/workers/gpu-0/pause/", {"reason": "tune"})
    row = latest("replica.pause")
    assert (row.before, row.after, row.reason) == ({"state": "ready"}, {"state": "paused"}, "tune")
    assert latest("replica.answer").after["acknowledgements"]["gpu-0"]["ok"] is False


def test_a_deleted_tenant_leaves_what_it_was_under_the_name_that_does_not_change(admin: Client, acme: Tenant) -> None:
    services.create_key(tenant=acme)
    ServiceLevel.objects.create(tenant=acme, priority=2, ttft_ms=300)
    page = f"/admin/scheduling/tenant/{acme.pk}/delete/"
    assert 'name="reason"' in admin.get(page).content.decode()
    refused = admin.post(page, {"post": "yes"})
    assert (refused.status_code, Tenant.objects.filter(name="acme").exists()) == (200, True)
    assert "Give a reason" in refused.content.decode()
    assert admin.post(page, {"post": "yes", "reason": "contract ended"}).status_code == 302
    row = latest("tenant.delete")
    assert (row.target, row.reason, row.after) == ("acme", "contract ended", {})
    assert (row.before["weight"], row.before["quota"]["rpm"]) == (2.0, 60)
    assert [level["ttft_ms"] for level in row.before["service_levels"]] == [300]
    assert len(row.before["keys"]) == 1


def test_a_deletion_of_several_asks_why_on_its_own_page(admin: Client, acme: Tenant) -> None:
    listed, chosen = "/admin/scheduling/tenant/", {"action": "delete_selected", "_selected_action": [acme.pk]}
    assert 'name="reason"' in admin.post(listed, chosen).content.decode()
    refused = admin.post(listed, chosen | {"post": "yes"})
    assert "Give a reason" in " ".join(str(message) for message in get_messages(refused.wsgi_request))
    assert Tenant.objects.filter(name="acme").exists()
    assert admin.post(listed, chosen | {"post": "yes", "reason": "contract ended"}).status_code == 302
    assert (latest("tenant.delete").target, latest("tenant.delete").reason) == ("acme", "contract ended")


def test_a_bulk_action_and_a_change_ask_why(admin: Client, acme: Tenant) -> None:
    listed, chosen = "/admin/scheduling/tenant/", {"action": "suspend", "_selected_action": [acme.pk]}
    assert 'name="reason"' in admin.get(listed).content.decode()
    admin.post(listed, chosen)
    acme.refresh_from_db()
    assert not acme.suspended
    admin.post(listed, chosen | {"reason": "unpaid"})
    assert latest("tenant.suspend").reason == "unpaid"
    level = ServiceLevel.objects.create(tenant=acme, priority=2, ttft_ms=300)
    page = f"/admin/scheduling/servicelevel/{level.pk}/change/"
    form = {"tenant": acme.pk, "priority": 2, "ttft_ms": 200, "objective_percent": 99}
    unexplained = admin.post(page, form)
    assert list(unexplained.context["adminform"].form.errors) == ["reason"]
    form["tenant"] = Tenant.objects.get(name="other").pk
    assert admin.post(page, form | {"reason": "as agreed"}).status_code == 302
    row = latest("servicelevel.update")
    assert (row.target, row.reason) == ("other/high", "as agreed")
    assert (row.before, row.after) == ({"tenant": "acme", "ttft_ms": 300}, {"tenant": "other", "ttft_ms": 200})


def test_passwords_that_are_set_are_written_down_and_never_what_they_are(admin: Client) -> None:
    olga = operator()
    page = f"/admin/auth/user/{olga.pk}/password/"
    assert 'name="reason"' in admin.get(page).content.decode()
    form = {"password1": "tulips-in-may", "password2": "tulips-in-may", "usable_password": "true"}
    assert admin.post(page, form).status_code == 200
    assert not OperatorAction.objects.exists()
    assert admin.post(page, form | {"reason": "forgotten"}).status_code == 302
    row = latest("user.password")
    assert (row.target, row.actor_name, row.reason, row.after) == ("olga", "ada", "forgotten", {"password": "changed"})
    own = {"old_password": "x", "new_password1": "roses-in-june", "new_password2": "roses-in-june"}
    assert admin.post("/admin/password_change/", own).status_code == 302
    assert (latest("user.password").target, latest("user.password").reason) == ("ada", "one's own")
    kept = str(list(OperatorAction.objects.values()))
    assert not [word for word in ("tulips", "roses", "md5$") if word in kept]


def test_rights_of_accounts_and_groups_are_written_down(admin: Client) -> None:
    olga, right = operator(), Permission.objects.get(codename="view_batch")
    form = {
        "username": "olga", "email": "olga@example.org", "is_active": "on", "user_permissions": [right.pk],
        "date_joined_0": "2026-01-01", "date_joined_1": "00:00:00", "reason": "she looks after batches",
    }  # fmt: skip
    assert admin.post(f"/admin/auth/user/{olga.pk}/change/", form).status_code == 302
    row = latest("user.update")
    changed = {name: (row.before[name], row.after[name]) for name in row.after if row.before[name] != row.after[name]}
    assert changed == {
        "email": ("", "olga@example.org"),
        "groups": (["operator"], []),
        "user_permissions": ([], ["controlplane.view_batch"]),
    }
    assert row.reason == "she looks after batches"
    assert admin.post(f"/admin/auth/user/{olga.pk}/change/", form).status_code == 302
    assert latest("user.update") == row, "what changes nothing is no row"
    group = Group.objects.create(name="auditors")
    assert admin.post(f"/admin/auth/group/{group.pk}/change/", {"name": "auditors"}).status_code == 200
    rights = {"name": "auditors", "permissions": [right.pk], "reason": "they read batches"}
    assert admin.post(f"/admin/auth/group/{group.pk}/change/", rights).status_code == 302
    row = latest("group.update")
    assert (row.target, row.before, row.after) == (
        "auditors", {"permissions": []}, {"permissions": ["controlplane.view_batch"]},
    )  # fmt: skip
    assert admin.post(f"/admin/auth/group/{group.pk}/delete/", {"post": "yes", "reason": "empty"}).status_code == 302
    assert latest("group.delete").before["permissions"] == ["controlplane.view_batch"]
    assert admin.post(f"/admin/auth/user/{olga.pk}/delete/", {"post": "yes", "reason": "she left"}).status_code == 302
    assert latest("user.delete").before["email"] == "olga@example.org"


def test_the_admin_s_list_says_from_where(admin: Client, acme: Tenant) -> None:
    admin.post("/admin/scheduling/tenant/", {"action": "suspend", "_selected_action": [acme.pk], "reason": "unpaid"})
    assert "127.0.0.1" in admin.get("/admin/scheduling/operatoraction/").content.decode()


def test_the_header_names_the_group_that_one_is_in() -> None:
    for name in ("viewer", "operator", "administrator"):
        member, client = User.objects.create_user(name), Client()
        member.groups.add(Group.objects.get(name=name))
        client.force_login(member)
        assert f'<span class="role">{name}</span>' in client.get("/audit/").content.decode()
