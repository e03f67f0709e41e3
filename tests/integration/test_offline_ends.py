"""How batches end, by the database alone."""

import json
import tracemalloc
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import settings
from django.utils import timezone

from controlplane.models import Batch, BatchLine, StoredFile
from controlplane.offline.batches import LINES_IN_MEMORY, cancel_batch, end_batch
from controlplane.offline.files import content_path


@pytest.mark.django_db
def test_a_batch_that_is_cancelled_while_it_expires_keeps_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "PENSTOCK", settings.PENSTOCK.model_copy(update={"files": tmp_path}))
    batch = Batch.objects.create(
        id="batch_1", tenant="alpha", endpoint="/v1/completions", status=Batch.Status.IN_PROGRESS, num_total=1,
        expires_at=timezone.now() - timedelta(seconds=1),
    )  # fmt: skip
    BatchLine.objects.create(
        batch=batch, number=1, custom_id="a", body="{}", state=BatchLine.State.COMPLETED, status_code=200, answer="{}"
    )
    cancel_batch(Batch.objects.get())
    end_batch(batch, Batch.Status.EXPIRED)
    assert not StoredFile.objects.exists()
    end_batch(Batch.objects.get(), Batch.Status.CANCELLED)
    ended = Batch.objects.get()
    assert (ended.status, ended.num_completed) == ("cancelled", 1)
    assert StoredFile.objects.get().id == ended.output_file_id


@pytest.mark.django_db
def test_the_answers_of_a_batch_are_never_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "PENSTOCK", settings.PENSTOCK.model_copy(update={"files": tmp_path}))
    num, answer = 5 * LINES_IN_MEMORY, json.dumps({"text": "a" * 20_000})
    batch = Batch.objects.create(
        id="batch_1", tenant="alpha", endpoint="/v1/completions", status=Batch.Status.FINALIZING, num_total=num,
        expires_at=timezone.now() + timedelta(hours=1),
    )  # fmt: skip
    lines = (
        BatchLine(
            batch=batch, number=number, custom_id=str(number), body="{}", state=BatchLine.State.COMPLETED,
            status_code=200, answer=answer,
        )
        for number in range(num)
    )  # fmt: skip
    BatchLine.objects.bulk_create(lines, batch_size=LINES_IN_MEMORY)
    tracemalloc.start()
    end_batch(batch, Batch.Status.COMPLETED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file = StoredFile.objects.get()
    written = content_path(file.id).read_bytes().splitlines()
    assert file.num_bytes == content_path(file.id).stat().st_size > num * len(answer)
    assert [json.loads(line)["custom_id"] for line in written] == [str(number) for number in range(num)]
    assert peak < file.num_bytes / 2
