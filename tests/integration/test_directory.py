"""The in-memory directory follows the database, with Redis and without."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio
from django.db import connections

from controlplane.api.caller import find_caller
from controlplane.config import Config
from inference.directory import Directory, DirectoryWatch, load_directory, publish_deployments
from inference.gateway.errors import InvalidKey, Unavailable
from inference.models import ModelDeployment
from scheduling import services
from scheduling.keys import Keys
from scheduling.models import ApiKey, ServiceLevel, Tenant
from tests.patience import PATIENCE_S

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]


@pytest.fixture
def tenant(installation: Config) -> Tenant:
    return services.create_tenant(name="acme", weight=2.5, rpm=60, tpm=None, concurrency=4, max_priority=1)


def test_a_key_is_found_by_its_plain_text_alone(tenant: Tenant) -> None:
    plain = services.create_key(tenant=tenant, max_priority=3)
    directory = load_directory()
    found = directory.find_key(plain)
    assert found is not None
    assert (found.tenant, found.max_priority) == ("acme", 3)
    assert directory.find_key(plain + "x") is None
    assert plain not in str(ApiKey.objects.values())


def test_the_tenants_ceiling_holds_for_a_key_that_asks_for_more(tenant: Tenant) -> None:
    plain = services.create_key(tenant=tenant, max_priority=0)
    found = load_directory().find_key(plain)
    assert found is not None
    assert found.max_priority == 1


def test_quota_weight_and_suspension_stand_in_the_directory(tenant: Tenant) -> None:
    services.suspend_tenant(tenant=tenant, reason="unpaid")
    config = load_directory().tenants["acme"]
    assert (config.weight, config.suspended, config.rpm, config.tpm, config.concurrency) == (2.5, True, 60, None, 4)


def test_a_tenants_own_target_for_a_priority_goes_before_everybodys(tenant: Tenant) -> None:
    services.update_tenant(tenant=tenant, drop_expired=True)
    ServiceLevel.objects.create(priority=3, e2e_ms=8000)
    ServiceLevel.objects.create(priority=5, e2e_ms=60_000)
    ServiceLevel.objects.create(tenant=tenant, priority=3, e2e_ms=2000)
    ServiceLevel.objects.create(tenant=tenant, priority=2, ttft_ms=100)
    services.create_tenant(name="other")
    tenants = load_directory().tenants
    assert (tenants["acme"].deadlines_s, tenants["acme"].drop_expired) == ({3: 2.0, 5: 60.0}, True)
    assert (tenants["other"].deadlines_s, tenants["other"].drop_expired) == ({3: 8.0, 5: 60.0}, False)


def test_a_rotated_key_is_replaced_at_once(tenant: Tenant) -> None:
    old = services.create_key(tenant=tenant, name="batch jobs")
    new = services.rotate_key(key=ApiKey.objects.get())
    directory = load_directory()
    assert directory.find_key(old) is None
    assert directory.find_key(new) is not None


async def test_before_the_database_was_read_no_key_is_called_wrong(astore: redis.asyncio.Redis, keys: Keys) -> None:
    watch = DirectoryWatch(astore, keys)
    with pytest.raises(Unavailable):
        find_caller("Bearer ps-unknown", watch.current)
    await watch.start()
    try:
        with pytest.raises(InvalidKey):
            find_caller("Bearer ps-unknown", watch.current)
    finally:
        await watch.stop()


def test_deployments_are_published_and_withdrawn(store: redis.Redis, keys: Keys) -> None:
    ModelDeployment.objects.create(name="demo", path="/models/demo", mode="static")
    assert publish_deployments(store, keys, load_directory())
    assert not publish_deployments(store, keys, load_directory())
    spec = store.hget(keys.deployments, "demo")
    assert spec is not None
    assert b'"mode":"static"' in spec
    ModelDeployment.objects.update(enabled=False)
    assert publish_deployments(store, keys, load_directory())
    assert store.hgetall(keys.deployments) == {}


async def change(service: Callable[..., Any], **arguments: Any) -> None:
    """Call a service as another process would: on a connection of its own, which is closed afterwards."""

    def call() -> None:
        try:
            service(**arguments)
        finally:
            connections.close_all()

    await asyncio.to_thread(call)


class _Followed:
    """Lets a test wait until the watch shows what it expects."""

    def __init__(self) -> None:
        self.directory = Directory()
        self._changed = asyncio.Event()

    def __call__(self, directory: Directory) -> None:
        self.directory = directory
        self._changed.set()

    async def until(self, condition: Callable[[Directory], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self.directory):
                self._changed.clear()
                await self._changed.wait()


async def test_a_suspension_reaches_a_watching_process_by_way_of_redis(
    astore: redis.asyncio.Redis, keys: Keys, tenant: Tenant
) -> None:
    follow = _Followed()
    watch = DirectoryWatch(astore, keys, database_period_s=3600, on_change=follow)
    await watch.start()
    try:
        assert not watch.current.tenants["acme"].suspended
        await change(services.suspend_tenant, tenant=tenant)
        await follow.until(lambda d: d.tenants["acme"].suspended)
    finally:
        await watch.stop()
    period_s = inspect.signature(DirectoryWatch).parameters["redis_period_s"].default
    assert period_s <= 0.5, "a change is to be in force within a second"


async def test_without_redis_the_watch_still_follows_the_database(tenant: Tenant) -> None:
    follow = _Followed()
    async with redis.asyncio.Redis.from_url("redis://127.0.0.1:1", retry=None) as nowhere:
        watch = DirectoryWatch(nowhere, Keys(), redis_period_s=0.02, on_change=follow)
        await watch.start()
        try:
            await change(services.update_quota, tenant=tenant, rpm=7)
            await follow.until(lambda d: d.tenants["acme"].rpm == 7)
        finally:
            await watch.stop()
