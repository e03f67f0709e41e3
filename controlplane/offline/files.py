"""Tenants' files: rows in the database, contents in a folder, both bounded."""

import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from django.conf import settings
from django.db.models import Sum

from controlplane.models import Batch, StoredFile
from inference.gateway.errors import InvalidRequest, NotFound
from scheduling.models import Tenant

MAX_FILES = 1000
"""Of one tenant."""
MAX_TOTAL = 16
"""Times the largest file: what a tenant may keep in all."""
ORPHAN_S = 3600.0
"""A content without a row that is younger may be about to get one."""
ACTIVE = (Batch.Status.VALIDATING, Batch.Status.IN_PROGRESS, Batch.Status.FINALIZING, Batch.Status.CANCELLING)


def content_path(file_id: str) -> Path:
    """Where a file's content lies. Ids are ours, never a client's."""
    folder: Path = settings.PENSTOCK.files_folder
    return folder / file_id


def store_file(*, tenant: str, filename: str, purpose: str, content: bytes) -> StoredFile:
    """Write a client's file whole, then its row. Raises InvalidRequest beyond the bounds."""
    _check_bounds(tenant, len(content))
    return store_parts(tenant=tenant, filename=filename, purpose=purpose, parts=[content])


def store_parts(*, tenant: str, filename: str, purpose: str, parts: Iterable[bytes]) -> StoredFile:
    """Write a file part by part, of which one at a time is in memory, then its row. It is there whole or not at all."""
    file = StoredFile(id=f"file-{uuid.uuid4().hex}", tenant=tenant, filename=filename[:255], purpose=purpose)
    path = content_path(file.id)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        file.num_bytes = sum(out.write(part) for part in parts)
    draft.rename(path)
    file.save(force_insert=True)
    return file


def _check_bounds(tenant: str, num_bytes: int) -> None:
    limit: int = settings.PENSTOCK.max_file_bytes
    if num_bytes > limit:
        raise InvalidRequest(f"A file has at most {limit} bytes.", param="file", code="file_too_large")
    mine = StoredFile.objects.filter(tenant=tenant)
    total = mine.aggregate(total=Sum("num_bytes"))["total"] or 0
    if mine.count() >= MAX_FILES or total + num_bytes > MAX_TOTAL * limit:
        raise InvalidRequest("This tenant's files have used up their room; delete some.", code="files_full")


def find_file(tenant: str, file_id: str) -> StoredFile:
    """Raises NotFound, for another tenant's file too."""
    file = None if "\0" in file_id else StoredFile.objects.filter(tenant=tenant, id=file_id).first()
    if file is None:
        raise NotFound(f"There is no file {file_id[:100]}.", code="file_not_found")
    return file


def remove_orphans() -> int:
    """Delete contents that no row names, drafts that were never finished, and files of tenants who are no more.

    They are left by a process that died between two steps, and by an administrator who deleted a tenant. Returns how
    many were deleted.
    """
    num = 0
    used = Batch.objects.filter(status__in=ACTIVE).values("input_file_id")
    for file in StoredFile.objects.exclude(tenant__in=Tenant.objects.values("name")).exclude(id__in=used):
        delete_file(file)
        num += 1
    folder, young_s = content_path(""), time.time() - ORPHAN_S
    paths = [path for path in folder.glob("file-*") if path.stat().st_mtime < young_s] if folder.exists() else []
    for first in range(0, len(paths), 500):
        some = {path.stem: path for path in paths[first : first + 500]}
        known = set(StoredFile.objects.filter(id__in=some).values_list("id", flat=True))
        for path in paths[first : first + 500]:
            if path.stem not in known or path.suffix:
                path.unlink(missing_ok=True)
                num += 1
    return num


def delete_file(file: StoredFile) -> None:
    """Remove row and content. Raises InvalidRequest while a batch reads it."""
    if Batch.objects.filter(input_file_id=file.id, status__in=ACTIVE).exists():
        raise InvalidRequest("A batch still uses this file.", code="file_in_use")
    path = content_path(file.id)
    file.delete()
    path.unlink(missing_ok=True)
