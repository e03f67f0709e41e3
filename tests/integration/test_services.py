"""Changes of tenants and keys: audited, counted once, and kept where Redis is away."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from django.contrib.auth.models import Group, Permission, User
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils import timezone

from controlplane.config import Config
from inference.models import BatchRecord, RequestRecord
from inference.records import make_row
from inference.services import prune_history
from scheduling import services
from scheduling.keys import Keys
from scheduling.models import ApiKey, ConfigVersion, OperatorAction, Quota, ServiceLevel, Tenant
from tests.integration.test_historian import batch_event, request_event

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]


@pytest.fixture
def tenant(installation: Config) -> Tenant:
    return services.create_tenant(name="acme", rpm=60)


def version() -> int:
    return ConfigVersion.objects.get().version


def test_a_change_that_is_rolled_back_is_neither_counted_nor_announced(
    tenant: Tenant, store: redis.Redis, keys: Keys
) -> None:
    before, announced = version(), store.get(keys.config_version)

    def fail_afterwards() -> None:
        with transaction.atomic():
            services.suspend_tenant(tenant=tenant)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_afterwards()
    assert version() == before
    assert store.get(keys.config_version) == announced
    assert not OperatorAction.objects.filter(action="tenant.suspend").exists()


def test_a_change_holds_while_redis_is_away(tenant: Tenant, installation: Config, tmp_path: Path) -> None:
    object.__setattr__(installation, "redis_url", f"unix://{tmp_path}/none.sock")
    installation.__dict__.pop("redis", None)
    before = version()
    services.update_quota(tenant=tenant, rpm=5)
    assert version() == before + 1
    assert Quota.objects.get().rpm == 5


def test_suspending_twice_is_written_down_once(tenant: Tenant) -> None:
    services.suspend_tenant(tenant=tenant, reason="unpaid")
    services.suspend_tenant(tenant=tenant, reason="unpaid")
    action = OperatorAction.objects.get(action="tenant.suspend")
    assert (action.actor_name, action.target, action.reason) == ("system", "acme", "unpaid")
    assert (action.before, action.after) == ({"suspended": False}, {"suspended": True})


def test_the_audit_trail_keeps_the_name_of_a_deleted_account(tenant: Tenant) -> None:
    actor = User.objects.create_user("olga")
    services.suspend_tenant(tenant=tenant, actor=actor)
    actor.delete()
    action = OperatorAction.objects.get(action="tenant.suspend")
    assert (action.actor, action.actor_name) == (None, "olga")


def test_an_audit_row_is_never_written_again(tenant: Tenant) -> None:
    row = OperatorAction.objects.first()
    assert row is not None
    row.reason = "rewritten"
    with pytest.raises(IntegrityError):
        row.save()


def test_keys_differ_and_only_digests_are_kept(tenant: Tenant) -> None:
    plain = [services.create_key(tenant=tenant) for _ in range(20)]
    assert len(set(plain)) == 20
    assert all(len(key) >= 3 + 8 + 1 + 32 for key in plain)
    rows = list(ApiKey.objects.values())
    assert not any(key in str(row) or key.split("-", 2)[2] in str(row) for key in plain for row in rows)


@pytest.mark.parametrize("name", ["", "Acme", "a b", "{x}", "-a", "a" * 64])
def test_a_bad_tenant_name_is_explained(installation: Config, name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        services.create_tenant(name=name)
    assert "name" in caught.value.message_dict


def test_the_database_itself_refuses_impossible_values(tenant: Tenant) -> None:
    impossible: list[Callable[[], object]] = [
        lambda: Quota.objects.update(rpm=0),
        lambda: Quota.objects.update(max_priority=6),
        lambda: Tenant.objects.update(weight=0),
        lambda: ServiceLevel.objects.create(priority=3),
        lambda: ConfigVersion.objects.create(id=2),
    ]
    for change in impossible:
        with pytest.raises(IntegrityError), transaction.atomic():
            change()


def test_there_is_one_default_target_for_a_priority(tenant: Tenant) -> None:
    ServiceLevel.objects.create(priority=3, ttft_ms=500)
    ServiceLevel.objects.create(tenant=tenant, priority=3, ttft_ms=100)
    with pytest.raises(ValidationError, match="There are default targets for this priority already"):
        ServiceLevel(priority=3, e2e_ms=9).full_clean()


def test_a_viewer_sees_and_an_operator_also_turns_the_gate(db: None) -> None:
    held = {g.name: set(g.permissions.values_list("codename", flat=True)) for g in Group.objects.all()}
    assert all(name.startswith("view_") for name in held["viewer"])
    assert held["operator"] - held["viewer"] == {"switch_policy", "control_replica"}
    user = User.objects.create_user("olga")
    user.groups.add(Group.objects.get(name="operator"))
    assert user.has_perm("scheduling.switch_policy")
    assert user.has_perm("inference.control_replica")
    assert Permission.objects.filter(codename="switch_policy").count() == 1


def test_old_history_is_pruned_and_recent_kept(db: None) -> None:
    now_s = timezone.now().timestamp()
    old_s = now_s - timedelta(days=31).total_seconds()
    make_row(request_event("old", finished_s=old_s)).save()
    make_row(request_event("new", finished_s=now_s)).save()
    make_row(batch_event(int(old_s))).save()
    make_row(batch_event(int(now_s))).save()
    assert prune_history(days=30) == 2
    assert RequestRecord.objects.get().request_id == "new"
    assert BatchRecord.objects.count() == 1
