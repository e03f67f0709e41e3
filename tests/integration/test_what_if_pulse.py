"""A replay that computes without a word is not taken for dead, and one whose process died is."""

import threading
from datetime import timedelta

import pytest
from django.utils import timezone

from dashboard.models import WhatIfRun
from dashboard.what_if import LOST_AFTER_S, end_lost_runs, pulse

pytestmark = pytest.mark.django_db(transaction=True)
PATIENCE_S = 60.0


def test_a_silent_replay_lives_as_long_as_its_process() -> None:
    now = timezone.now()
    run = WhatIfRun.objects.create(model="demo", start=now, end=now, candidates=[], state=WhatIfRun.State.RUNNING)
    long_ago = now - timedelta(seconds=2 * LOST_AFTER_S)
    WhatIfRun.objects.update(updated_at=long_ago)
    with pulse(run.pk, 0.01):
        pause = threading.Event()
        for _ in range(int(PATIENCE_S / 0.01)):
            run.refresh_from_db()
            if run.updated_at > long_ago:
                break
            pause.wait(0.01)
        assert end_lost_runs() == 0
    WhatIfRun.objects.update(updated_at=long_ago)
    assert end_lost_runs() == 1
    run.refresh_from_db()
    assert run.state == WhatIfRun.State.FAILED
    assert "interrupted" in run.error
