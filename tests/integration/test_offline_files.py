"""Files that nobody can reach are deleted, and a batch waits for its tenant to go on and for a worker."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import redis.asyncio
from django.conf import settings
from django.utils import timezone

from controlplane.models import Batch, BatchLine, StoredFile
from controlplane.offline.files import ORPHAN_S, content_path, remove_orphans, store_file
from controlplane.offline.runner import OfflineRunner
from inference.directory import TenantConfig
from scheduling.keys import Keys
from scheduling.models import Tenant
from scheduling.store import TIME
from tests.integration.gateway_support import open_gateway
from tests.patience import until


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(settings, "PENSTOCK", settings.PENSTOCK.model_copy(update={"files": tmp_path}))
    return content_path("")


def age(path: Path) -> None:
    long_ago = time.time() - ORPHAN_S - 60
    os.utime(path, (long_ago, long_ago))


@pytest.mark.django_db
def test_contents_without_a_row_and_files_of_deleted_tenants_are_removed(folder: Path) -> None:
    Tenant.objects.create(name="alpha")
    kept, gone, busy = (
        store_file(tenant=tenant, filename="a", purpose="batch", content=b"{}") for tenant in ("alpha", "past", "past")
    )
    Batch.objects.create(
        id="batch_1", tenant="past", endpoint="/v1/completions", input_file_id=busy.id, expires_at=timezone.now()
    )
    for name in ("file-lost", "file-half.draft", "file-young", "other"):
        (folder / name).write_bytes(b"x")
    for path in folder.iterdir():
        if path.name != "file-young":
            age(path)
    assert remove_orphans() == 3
    assert {path.name for path in folder.iterdir()} == {kept.id, busy.id, "file-young", "other"}
    assert not StoredFile.objects.filter(id=gone.id).exists()
    assert remove_orphans() == 0


@pytest.mark.django_db(transaction=True)
async def test_a_batch_of_a_suspended_tenant_waits_until_the_tenant_may_go_on(
    redis_url: str, keys: Keys, tmp_path: Path
) -> None:
    await make_batch(1)

    async def state_after_a_round(tenant: TenantConfig) -> str:
        async with open_gateway(redis_url, keys, tmp_path / "model", tenant) as gateway:
            await OfflineRunner(gateway)._round([await Batch.objects.aget()])
        return (await BatchLine.objects.aget()).state

    suspended = TenantConfig(name="alpha", max_priority=0, suspended=True)
    assert await state_after_a_round(suspended) == "pending"
    assert (await Batch.objects.aget()).status == "in_progress"
    assert await state_after_a_round(TenantConfig(name="alpha", max_priority=0)) == "submitted"


@pytest.mark.django_db(transaction=True)
async def test_while_nobody_serves_a_batch_asks_once_and_that_is_no_miss(
    redis_url: str, astore: redis.asyncio.Redis, keys: Keys, tmp_path: Path
) -> None:
    batch = await make_batch(5)
    async with open_gateway(redis_url, keys, tmp_path / "model", no_replica_s=1e-6) as gateway:

        async def refuses() -> bool:
            await gateway.pipeline.send(TIME)
            return bool(gateway.desk.why_unserved("tiny"))

        await until(refuses)
        runner = OfflineRunner(gateway)
        for _ in range(2):
            await runner._round([batch])
        await gateway.pipeline.send(TIME)  # after the counts
    assert await astore.hgetall(keys.refusals) == {b"tiny|alpha|no_replica": b"1"}
    assert await astore.hgetall(keys.turned_away) == {}
    assert await BatchLine.objects.filter(state="pending").acount() == 5


async def make_batch(num_lines: int) -> Batch:
    batch = await Batch.objects.acreate(
        id="batch_1", tenant="alpha", endpoint="/v1/completions", status=Batch.Status.IN_PROGRESS, num_total=num_lines,
        expires_at=timezone.now() + timedelta(hours=1),
    )  # fmt: skip
    body = '{"model": "tiny", "prompt": "ba", "max_tokens": 3}'
    for number in range(1, num_lines + 1):
        await BatchLine.objects.acreate(batch=batch, number=number, custom_id=str(number), body=body)
    return batch
