"""Who gets in, and to what: groups in pages, admin and API, operators' tokens, and the bound on guessing passwords."""

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.contrib.auth.models import Group, User
from django.http import HttpResponse
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver
from django.utils import timezone

from controlplane.api.native import api
from controlplane.config import Config
from controlplane.models import MAX_ACTIVE, OperatorToken
from controlplane.tokens import create_token
from dashboard.sign_in import PER_ACCOUNT, PER_ACCOUNT_AND_ADDRESS, PER_ADDRESS, WINDOW_S, SignInLimit
from scheduling.keys import Keys
from scheduling.models import OperatorAction

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]

PASSWORD = "gate-keeper-1"
CONTROL = "/api/v1/replicas/gpu-9/control"
PAUSE = {"command": "pause", "reason": "to see who may"}
OPEN = {"login/", "logout/", "session/", "api/docs", "api/openapi.json"}
"""What answers without an account: ways in and out, and the documentation of the API."""


@pytest.fixture(autouse=True)
def users(db: None) -> None:
    for name in ("viewer", "operator", "administrator"):
        User.objects.create_user(name, password=PASSWORD).groups.add(Group.objects.get(name=name))


def user(name: str) -> User:
    return User.objects.get(username=name)


def sign_in(name: str, password: str = PASSWORD, address: str = "10.1.2.3") -> HttpResponse:
    response: Any = Client(REMOTE_ADDR=address).post("/login/", {"username": name, "password": password})
    return response  # type: ignore[no-any-return]


def call(token: str, path: str = CONTROL, body: object = PAUSE) -> Any:
    client = Client(enforce_csrf_checks=True, headers={"Authorization": f"Bearer {token}"})
    return client.post(path, json.dumps(body), content_type="application/json")


def code_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_guessing_ends_after_five_attempts_and_the_page_says_when_to_try_again(installation: Config) -> None:
    for _ in range(PER_ACCOUNT_AND_ADDRESS):
        assert sign_in("viewer", "wrong").status_code == 200
    refused = sign_in("viewer", PASSWORD)
    assert refused.status_code == 429
    assert 0 < int(refused["Retry-After"]) <= WINDOW_S
    assert "Too many attempts. Try again in 15 minutes." in refused.content.decode()
    assert sign_in("VIEWER ", "wrong").status_code == 429
    assert sign_in("viewer", address="10.9.9.9").status_code == 302
    assert sign_in("operator").status_code == 302


def test_a_success_forgives_the_attempts_before_it(installation: Config) -> None:
    for _ in range(4):
        for _ in range(PER_ACCOUNT_AND_ADDRESS - 1):
            sign_in("viewer", "wrong")
        assert sign_in("viewer").status_code == 302


def test_one_address_cannot_try_many_accounts_and_its_neighbours_of_ipv6_are_it(store: redis.Redis, keys: Keys) -> None:
    limit = SignInLimit(store, keys)
    waits = [limit.begin(f"user-{i}", f"2001:db8::{i:x}") for i in range(PER_ADDRESS + 5)]
    assert sum(wait > 0 for wait in waits) == 5
    assert not limit.begin("user-1", "2001:db8:0:1::1")
    mapped = [limit.begin(f"other-{i}", f"::ffff:10.0.{i}.1") for i in range(PER_ADDRESS + 5)]
    assert not any(mapped), "addresses of IPv4 are not neighbours"
    counters = list(store.scan_iter(f"{keys.prefix}:sign_in:*"))
    assert counters
    assert all(0 < store.ttl(key) <= WINDOW_S for key in counters)


def test_one_address_locks_nobody_out_elsewhere_and_many_do(store: redis.Redis, keys: Keys) -> None:
    limit = SignInLimit(store, keys)
    for _ in range(PER_ACCOUNT + 20):
        limit.begin("operator", "10.0.0.1")
    assert not limit.begin("operator", "10.0.0.2"), "what its address was refused counts for nobody"
    num_let_through = PER_ACCOUNT_AND_ADDRESS + 1
    for i in range(PER_ACCOUNT - num_let_through):
        assert not limit.begin("operator", f"10.1.{i}.1")
    assert 0 < limit.begin("operator", "10.2.0.1") <= WINDOW_S
    assert not limit.begin("viewer", "10.2.0.1")


def test_without_redis_an_operator_still_gets_in(keys: Keys) -> None:
    with redis.Redis.from_url("unix:///nowhere/redis.sock") as nobody:
        assert SignInLimit(nobody, keys).begin("operator", "10.1.2.3") == 0


def test_the_admin_is_for_administrators_and_has_no_sign_in_of_its_own(client: Client) -> None:
    assert client.get("/admin/").status_code == 302
    assert client.get("/admin/login/?next=/admin/").headers["Location"].startswith("/login/?next=/admin/")
    for name, status in (("viewer", 403), ("operator", 403), ("administrator", 200)):
        client.force_login(user(name))
        assert client.get("/admin/", follow=True).status_code == status
    assert client.get("/admin/scheduling/tenant/add/").status_code == 200
    assert client.get("/admin/scheduling/operatoraction/").status_code == 200


def test_an_administrator_cannot_become_or_change_a_superuser(client: Client) -> None:
    root = User.objects.create_superuser("root", password=PASSWORD)
    client.force_login(user("administrator"))
    operator = user("operator")
    form = {"username": "operator", "date_joined_0": "2026-01-01", "date_joined_1": "00:00:00", "is_superuser": "on"}
    form["reason"] = "on holiday"
    groups = {"groups": [Group.objects.get(name="viewer").pk], "is_active": "on"}
    assert client.post(f"/admin/auth/user/{operator.pk}/change/", form | groups).status_code == 302
    operator.refresh_from_db()
    assert not operator.is_superuser
    assert [group.name for group in operator.groups.all()] == ["viewer"]
    change = OperatorAction.objects.get(action="user.update")
    assert (change.before["groups"], change.after["groups"]) == (["operator"], ["viewer"])
    assert (change.before["is_superuser"], change.reason) == (False, "on holiday")
    assert client.get(f"/admin/auth/user/{root.pk}/password/").status_code == 403
    assert client.post(f"/admin/auth/user/{root.pk}/delete/", {"post": "yes"}).status_code == 403
    assert client.post("/admin/auth/group/add/", {"name": "x"}).status_code == 403
    for somebody_else in (root, user("viewer")):
        token = client.post("/admin/controlplane/operatortoken/add/", {"user": somebody_else.pk, "name": "x"})
        assert token.status_code == 200
        assert not OperatorToken.objects.exists()
    token = client.post("/admin/controlplane/operatortoken/add/", {"user": user("administrator").pk, "name": "x"})
    assert token.status_code == 302


def test_a_token_has_the_rights_of_its_user_s_groups_and_needs_no_csrf_token() -> None:
    _, operators = create_token(user=user("operator"), name="deploy")
    _, viewers = create_token(user=user("viewer"), name="watch")
    assert code_of(call(operators)) == (404, "replica_not_found")
    assert code_of(call(viewers)) == (403, "permission_denied")
    user("operator").groups.clear()
    assert code_of(call(operators)) == (403, "permission_denied")
    assert not OperatorToken.objects.filter(digest__contains=operators).exists()


def test_a_token_that_is_revoked_expired_or_of_a_closed_account_is_refused() -> None:
    token, plaintext = create_token(user=user("operator"), name="deploy")
    assert code_of(call(plaintext)) == (404, "replica_not_found")
    token.refresh_from_db()
    assert token.last_used_at is not None
    OperatorToken.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    assert code_of(call(plaintext)) == (401, "invalid_api_key")
    OperatorToken.objects.update(expires_at=None, revoked_at=timezone.now())
    assert code_of(call(plaintext)) == (401, "invalid_api_key")
    OperatorToken.objects.update(revoked_at=None)
    User.objects.filter(username="operator").update(is_active=False)
    assert code_of(call(plaintext)) == (401, "invalid_api_key")
    assert code_of(call("pso-12345678-nothing")) == (401, "invalid_api_key")


def test_a_user_makes_sees_and_revokes_their_own_tokens() -> None:
    client = Client()
    client.force_login(user("operator"))
    made = client.post("/api/v1/tokens", {"name": "deploy", "days": 7}, content_type="application/json")
    assert made.status_code == 201
    plaintext = made.json()["token"]
    assert re.fullmatch(r"pso-[a-z0-9]{8}-[A-Za-z0-9_-]{43}", plaintext)
    assert code_of(call(plaintext)) == (404, "replica_not_found")
    (seen,) = client.get("/api/v1/tokens").json()
    assert (seen["active"], "token" in seen, seen["shown"]) == (True, False, f"{plaintext[:12]}-…")
    assert code_of(call(plaintext, "/api/v1/tokens", {"name": "another"})) == (403, "permission_denied")
    other = Client()
    other.force_login(user("viewer"))
    assert other.delete(f"/api/v1/tokens/{seen['id']}?reason=lost").status_code == 404
    assert client.delete(f"/api/v1/tokens/{seen['id']}").status_code == 400
    assert not client.delete(f"/api/v1/tokens/{seen['id']}?reason=lost").json()["active"]
    assert code_of(call(plaintext)) == (401, "invalid_api_key")
    trail = [(row.action, row.actor_name, row.reason) for row in OperatorAction.objects.order_by("id")]
    assert trail == [("token.create", "operator", "deploy"), ("token.revoke", "operator", "lost")]
    assert plaintext not in str(list(OperatorAction.objects.values()))


def test_tokens_of_one_user_are_bounded() -> None:
    client = Client()
    client.force_login(user("viewer"))
    for _ in range(MAX_ACTIVE):
        assert client.post("/api/v1/tokens", {"name": "x"}, content_type="application/json").status_code == 201
    refused = client.post("/api/v1/tokens", {"name": "x"}, content_type="application/json")
    assert refused.status_code == 400
    assert "revoke one first" in refused.json()["error"]["message"]


def addresses(resolver: URLResolver, start: str = "") -> Iterator[str]:
    """Every address that Django answers, but for the admin's own, with a value for each part that varies."""
    for entry in resolver.url_patterns:
        address = start + re.sub(r"<[^>]*>", "1", str(entry.pattern))
        if isinstance(entry, URLPattern):
            yield address
        elif not address.startswith("admin"):
            yield from addresses(entry, address)


def test_every_page_asks_who_one_is(client: Client) -> None:
    found = set(addresses(get_resolver()))
    assert "workers/1/1/" in found
    for address in sorted(found - OPEN):
        for method in ("get", "post"):
            response = getattr(client, method)(f"/{address}")
            to_sign_in = response.status_code == 302 and response.headers["Location"].startswith("/login/")
            # 503: the test's process has no gateway, which the keys of tenants are asked of.
            no_gateway = response.status_code == 503 and address.startswith("v1/")
            nothing_there = response.status_code == 404 and address in ("api/", "api/1")
            refused = nothing_there or response.status_code in (401, 403, 405)
            assert to_sign_in or no_gateway or refused, f"{method} {address}: {response.status_code}"


def test_a_viewer_changes_nothing_on_any_page(client: Client) -> None:
    client.force_login(user("viewer"))
    theirs = ("api/", "v1/", "tokens/")
    for address in sorted(a for a in set(addresses(get_resolver())) - OPEN if not a.startswith(theirs)):
        response = client.post(f"/{address}", {"reason": "because"})
        assert response.status_code in (403, 405), f"{address}: {response.status_code}"


def test_every_operation_of_the_api_asks_who_one_is_and_lets_viewers_change_only_their_tokens(client: Client) -> None:
    viewer = Client()
    viewer.force_login(user("viewer"))
    operations = [(path, method) for path, methods in api.get_openapi_schema()["paths"].items() for method in methods]
    assert len(operations) > 8
    for path, method in operations:
        address = re.sub(r"\{[^}]*\}", "1", path)
        for asker in (client, viewer):
            if asker is viewer and (method == "get" or "/tokens" in path):
                continue
            response = asker.generic(method.upper(), address, "{}", content_type="application/json")
            # 503: the test's process has no gateway, which the keys of tenants are asked of; there, nobody got in.
            assert response.status_code in (401, 403, 503), f"{method} {path}: {response.status_code}"
