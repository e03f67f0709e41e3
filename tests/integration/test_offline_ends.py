"""How batches end, by the database alone."""

from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import settings
from django.utils import timezone

from controlplane.models import Batch, BatchLine, StoredFile
from controlplane.offline.batches import cancel_batch, end_batch


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
