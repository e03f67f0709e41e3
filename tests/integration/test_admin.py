"""The admin: what an administrator changes is audited and counted up; what others see is theirs to read."""

import re
from typing import Any

import pytest
import redis
from django.contrib.auth.models import Group, User
from django.contrib.messages import get_messages
from django.db.models.signals import pre_delete
from django.test import Client

from controlplane.config import Config
from inference.directory import load_directory
from inference.models import BatchRecord, ModelDeployment, Replica, RequestRecord
from inference.records import make_row
from scheduling import services
from scheduling.keys import Keys
from scheduling.models import ApiKey, ConfigVersion, OperatorAction, PolicyRevision, Quota, ServiceLevel, Tenant
from tests.integration.test_historian import batch_event, request_event

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]

KEY = re.compile(r"ps-[a-z0-9]{8}-[A-Za-z0-9_-]{43}")


@pytest.fixture
def admin(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("ada", password="x"))
    return client


@pytest.fixture
def tenant(installation: Config) -> Tenant:
    return services.create_tenant(name="acme", weight=2.0, rpm=60)


def version() -> int:
    return ConfigVersion.objects.get().version


def tenant_form(**values: Any) -> dict[str, Any]:
    form: dict[str, Any] = {
        "reason": "as agreed",
        "display_name": "Acme",
        "weight": "2.0",
        "quota-TOTAL_FORMS": 1,
        "quota-INITIAL_FORMS": 1,
        "quota-0-id": "",
        "quota-0-tenant": "",
        "quota-0-rpm": 60,
        "quota-0-max_priority": 2,
        "service_levels-TOTAL_FORMS": 0,
        "service_levels-INITIAL_FORMS": 0,
        "keys-TOTAL_FORMS": 0,
        "keys-INITIAL_FORMS": 0,
    }
    return form | values


def post_tenant(admin: Client, tenant: Tenant, **values: Any) -> list[str]:
    """Save the tenant's page; the messages that follow."""
    ids = {"quota-0-id": tenant.quota.pk, "quota-0-tenant": tenant.pk}
    response = admin.post(f"/admin/scheduling/tenant/{tenant.pk}/change/", tenant_form(**ids, **values))
    errors = [] if response.status_code == 302 else [response.context["errors"]]
    assert errors == []
    return [str(message) for message in get_messages(response.wsgi_request)]


def test_a_changed_quota_and_weight_are_audited_and_announced(
    admin: Client, tenant: Tenant, store: redis.Redis, keys: Keys
) -> None:
    before = (version(), int(store.get(keys.config_version) or 0))
    post_tenant(admin, tenant, **{"weight": "3.5", "quota-0-rpm": 120})
    config = load_directory().tenants["acme"]
    assert (config.weight, config.rpm) == (3.5, 120)
    assert version() > before[0]
    assert int(store.get(keys.config_version) or 0) > before[1]
    changes = {row.action: (row.before, row.after) for row in OperatorAction.objects.filter(actor_name="ada")}
    assert changes["tenant.update"] == (
        {"weight": 2.0, "display_name": ""},
        {"weight": 3.5, "display_name": "Acme"},
    )
    assert changes["quota.update"] == ({"rpm": 60}, {"rpm": 120})


def test_a_key_made_on_a_tenants_page_is_shown_once(admin: Client, tenant: Tenant) -> None:
    messages = post_tenant(admin, tenant, **{"keys-TOTAL_FORMS": 1, "keys-0-name": "batch", "keys-0-tenant": tenant.pk})
    found = KEY.search(" ".join(messages))
    assert found
    key = load_directory().find_key(found[0])
    assert key is not None
    assert key.tenant == "acme"
    page = admin.get(f"/admin/scheduling/tenant/{tenant.pk}/change/").content.decode()
    assert found[0] in page, "shown on the page that follows"
    page = admin.get(f"/admin/scheduling/tenant/{tenant.pk}/change/").content.decode()
    assert found[0] not in page
    assert f"ps-{key.prefix}-" in page
    assert OperatorAction.objects.filter(action="key.create", actor_name="ada").count() == 1
    assert found[0] not in str(list(OperatorAction.objects.values()))


def test_targets_are_added_and_taken_away(admin: Client, tenant: Tenant) -> None:
    forms: dict[str, Any] = {
        "service_levels-TOTAL_FORMS": 1,
        "service_levels-0-priority": 2,
        "service_levels-0-ttft_ms": 300,
        "service_levels-0-objective_percent": 99,
    }
    post_tenant(admin, tenant, **forms, **{"service_levels-0-tenant": tenant.pk})
    level = ServiceLevel.objects.get()
    assert (level.tenant, level.ttft_ms) == (tenant, 300)
    forms |= {"service_levels-INITIAL_FORMS": 1, "service_levels-0-id": level.pk, "service_levels-0-DELETE": "on"}
    post_tenant(admin, tenant, **forms, **{"service_levels-0-tenant": tenant.pk})
    assert not ServiceLevel.objects.exists()
    actions = list(OperatorAction.objects.filter(actor_name="ada").values_list("action", flat=True))
    assert "servicelevel.create" in actions
    assert "servicelevel.delete" in actions


def test_an_impossible_quota_is_explained(admin: Client, tenant: Tenant) -> None:
    ids = {"quota-0-id": tenant.quota.pk, "quota-0-tenant": tenant.pk}
    response = admin.post(
        f"/admin/scheduling/tenant/{tenant.pk}/change/", tenant_form(**ids, **{"quota-0-rpm": 0, "weight": "0"})
    )
    page = response.content.decode()
    assert "A limit is at least 1; leave the field empty for no limit." in page
    assert "A weight is at least 0.01." in page
    assert Quota.objects.get().rpm == 60


def test_a_tenant_is_made_with_its_quota(admin: Client) -> None:
    form = tenant_form(**{"name": "beta", "quota-INITIAL_FORMS": 0, "quota-0-rpm": 5})
    assert admin.post("/admin/scheduling/tenant/add/", form).status_code == 302
    assert load_directory().tenants["beta"].rpm == 5
    assert "Enter a valid" not in admin.post("/admin/scheduling/tenant/add/", form | {"name": "B C"}).content.decode()


def act(admin: Client, path: str, action: str, *rows: Any, **fields: Any) -> list[str]:
    form = {"action": action, "_selected_action": [row.pk for row in rows], "reason": "as agreed", **fields}
    response = admin.post(f"/admin/{path}/", form)
    assert response.status_code == 302
    return [str(message) for message in get_messages(response.wsgi_request)]


def test_suspend_and_resume_take_effect(admin: Client, tenant: Tenant) -> None:
    act(admin, "scheduling/tenant", "suspend", tenant)
    assert load_directory().tenants["acme"].suspended
    act(admin, "scheduling/tenant", "resume", tenant)
    assert not load_directory().tenants["acme"].suspended
    actions = OperatorAction.objects.filter(actor_name="ada").values_list("action", flat=True)
    assert sorted(actions) == ["tenant.resume", "tenant.suspend"]


def test_the_deletion_of_several_is_announced_once_they_are_gone(
    admin: Client, tenant: Tenant, store: redis.Redis, keys: Keys
) -> None:
    services.create_tenant(name="other")
    announced, meanwhile = store.get(keys.config_version), []

    def look(**_: Any) -> None:
        meanwhile.append(store.get(keys.config_version))

    pre_delete.connect(look, sender=Tenant)
    try:
        act(admin, "scheduling/tenant", "delete_selected", *Tenant.objects.all(), post="yes")
    finally:
        pre_delete.disconnect(look, sender=Tenant)
    assert meanwhile == [announced, announced]
    assert store.get(keys.config_version) != announced
    assert not load_directory().tenants
    assert OperatorAction.objects.filter(action="tenant.delete").count() == 2


def test_rotating_shows_the_new_key_and_revokes_the_old(admin: Client, tenant: Tenant) -> None:
    old = services.create_key(tenant=tenant, name="web", max_priority=4)
    messages = act(admin, "scheduling/apikey", "rotate", ApiKey.objects.get())
    found = KEY.search(" ".join(messages))
    assert found
    directory = load_directory()
    new = directory.find_key(found[0])
    assert new is not None
    assert (new.tenant, new.max_priority) == ("acme", 4)
    assert directory.find_key(old) is None


def test_more_keys_than_messages_can_show_are_not_rotated(admin: Client, tenant: Tenant) -> None:
    for _ in range(6):
        services.create_key(tenant=tenant)
    messages = act(admin, "scheduling/apikey", "rotate", *ApiKey.objects.all())
    assert messages == ["Choose one to 5 keys that are not revoked."]
    assert ApiKey.objects.filter(revoked_at=None).count() == 6


def test_a_model_is_withdrawn_and_offered(admin: Client, store: redis.Redis, keys: Keys) -> None:
    row = ModelDeployment.objects.create(name="demo", path="/models/demo")
    act(admin, "inference/modeldeployment", "withdraw", row)
    assert not load_directory().deployments
    act(admin, "inference/modeldeployment", "offer", row)
    assert store.hkeys(keys.deployments) == [b"demo"]


def upstream_form(**values: Any) -> dict[str, Any]:
    fields = {
        "name": "llama", "upstream_url": "http://127.0.0.1:11434", "upstream_model": "llama3.2:3b", "upstream_key": "",
        "max_batch_size": 4, "sizing": "gradient", "sizing_params": '{"largest": 8}', "upstream_first_token_s": 120,
        "upstream_gap_s": 30, "max_model_len": 0, "path": "", "enabled": "on",
    }  # fmt: skip
    return {**fields, **values}


def test_an_upstream_server_is_offered_and_changed(admin: Client, store: redis.Redis, keys: Keys) -> None:
    assert admin.post("/admin/inference/modeldeployment/add/", upstream_form()).status_code == 302
    row = ModelDeployment.objects.get()
    assert (row.backend, row.upstream_url, row.path) == ("openai", "http://127.0.0.1:11434/v1", "")
    assert store.hkeys(keys.deployments) == [b"llama"]
    page = f"/admin/inference/modeldeployment/{row.pk}/change/"
    changed = upstream_form(upstream_url=row.upstream_url, upstream_key="VLLM_API_KEY", reason="it asks now")
    assert admin.post(page, changed).status_code == 302
    created, updated = OperatorAction.objects.order_by("id")
    assert (created.action, created.after["upstream_model"]) == ("deployment.create", "llama3.2:3b")
    assert (updated.before, updated.after) == ({"upstream_key": ""}, {"upstream_key": "VLLM_API_KEY"})
    checkpoint = ModelDeployment.objects.create(name="demo", path="/models/demo")
    assert admin.post(f"/admin/inference/modeldeployment/{checkpoint.pk}/change/", changed).status_code == 403


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("upstream_url", "ftp://host/v1", "Only http and https"),
        ("upstream_url", "http://me:secret@host/v1", "environment variable"),
        ("upstream_key", "sk-0123", "_API_KEY"),
        ("sizing_params", '{"largest": 0}', "largest must be a number"),
        ("path", "/nowhere", "no tokenizer.json"),
        ("max_batch_size", "0", "at least 1"),
    ],
)
def test_an_upstream_that_cannot_be_is_explained(admin: Client, field: str, value: str, word: str) -> None:
    response = admin.post("/admin/inference/modeldeployment/add/", upstream_form(**{field: value}))
    assert response.status_code == 200
    assert word in " ".join(response.context["adminform"].form.errors[field])
    assert not ModelDeployment.objects.exists()


@pytest.fixture
def everything(tenant: Tenant) -> None:
    """A row of every table."""
    services.create_key(tenant=tenant)
    services.switch_policy(model="demo", name="fair", reason="because")
    ServiceLevel.objects.create(priority=0, ttft_ms=200)
    ModelDeployment.objects.create(name="demo", path="/models/demo", num_parameters=5_000_000)
    Replica.objects.create(name="gpu-0", state="ready")
    make_row(request_event("r1")).save()
    make_row(batch_event(1_760_000_001)).save()


PAGES = {
    "scheduling": [Tenant, ApiKey, ServiceLevel, PolicyRevision, OperatorAction],
    "inference": [ModelDeployment, Replica, RequestRecord, BatchRecord],
}
TABLES = [(app, model) for app, models in PAGES.items() for model in models]


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("app", "model"), TABLES)
def test_every_page_opens(admin: Client, app: str, model: Any) -> None:
    url = f"/admin/{app}/{model._meta.model_name}/"
    assert admin.get(url).status_code == 200
    assert admin.get(url, {"q": "a"}).status_code == 200
    assert admin.get(f"{url}{model.objects.first().pk}/change/").status_code == 200


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("app", "model"), TABLES)
def test_a_viewer_reads_and_changes_nothing(client: Client, app: str, model: Any) -> None:
    viewer = User.objects.create_user("vera", is_staff=True)
    viewer.groups.add(Group.objects.get(name="viewer"))
    client.force_login(viewer)
    url = f"/admin/{app}/{model._meta.model_name}/"
    pk = model.objects.first().pk
    assert client.get(url).status_code == 200
    assert client.get(f"{url}{pk}/change/").status_code == 200
    for path in (f"{pk}/change/", f"{pk}/delete/", "add/"):
        assert client.post(url + path, {}).status_code == 403


def test_history_and_audit_cannot_be_changed_even_by_an_administrator(admin: Client, everything: None) -> None:
    tables: list[tuple[str, Any]] = [
        ("inference", RequestRecord),
        ("scheduling", OperatorAction),
        ("scheduling", PolicyRevision),
    ]
    for app, model in tables:
        url = f"/admin/{app}/{model._meta.model_name}/"
        assert admin.get(f"{url}add/").status_code == 403
        pk = model.objects.first().pk
        assert admin.post(f"{url}{pk}/delete/", {"post": "yes"}).status_code == 403
        assert admin.post(f"{url}{pk}/change/", {"reason": "rewritten"}).status_code == 403
    row = OperatorAction.objects.first()
    assert row is not None
    row.reason = "rewritten"
    with pytest.raises(Exception, match=r"(?i)unique"):
        row.save()


def test_pages_carry_the_security_headers(admin: Client) -> None:
    response = admin.get("/admin/")
    assert "default-src 'self'" in response["Content-Security-Policy"]
    assert "unsafe" not in Client().get("/login/")["Content-Security-Policy"]
    assert response["X-Frame-Options"] == "DENY"
    assert response["X-Content-Type-Options"] == "nosniff"
    assert response["Referrer-Policy"] == "same-origin"
