"""A real engine process serves, the historian writes, and `manage.py replay --from-history` tells what happened."""

import json
from pathlib import Path

import pytest
import redis
from django.core.management import call_command

from inference.historian import Historian
from inference.models import BatchRecord, ModelDeployment, RequestRecord
from scheduling.keys import Keys
from tests.integration.engines import Engines, make_tiny_checkpoint
from tests.integration.fleet import FleetClient
from tests.patience import PATIENCE_S

SECONDS = 6
"""Of fewer no cost is learned."""
BURST = 400


@pytest.mark.django_db(transaction=True)
def test_what_an_engine_process_just_served_is_replayed(
    store: redis.Redis, redis_url: str, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All come at once, so that how long they take is told by all steps together: of requests that come as fast as they
    # are served, a replay that is late by the hiccup of one second stays late.
    checkpoint = make_tiny_checkpoint(tmp_path / "llama")
    ModelDeployment.objects.create(name=Engines.model, path=str(checkpoint), max_batch_size=8)
    fleet, historian = FleetClient(store, keys, Engines.model), Historian(store, keys)
    with Engines(checkpoint, redis_url, keys) as engines:
        engines.start()
        fleet.until_state("gpu-0", "ready")
        while BatchRecord.objects.count() < SECONDS:
            for number in range(len(fleet.answers), len(fleet.answers) + BURST):
                fleet.submit(f"r{number}", [5 + number % 200, 6, 7 + number % 3], 60 + number % 150)
            fleet.until_finished(3 * PATIENCE_S)
            historian.drain(1.0)

        def is_written() -> bool:
            historian.drain(1.0)
            return RequestRecord.objects.count() == len(fleet.answers)

        fleet.until(is_written)
    told = BatchRecord.objects.filter(busy_ms__gt=0, decode_sequences__gt=0)
    assert told.count() == BatchRecord.objects.count() > 0
    report = tmp_path / "report.json"
    call_command("replay", f"--from-history={Engines.model}", "--policies=fifo", f"--json={report}")
    assert "Prediction under fifo against the record: TTFT mean " in capsys.readouterr().out
    served, replayed = json.loads(report.read_text())["reports"]
    assert served["total"]["finished"] == replayed["total"]["finished"] == len(fleet.answers)
    assert replayed["total"]["e2e_s"]["mean"] == pytest.approx(served["total"]["e2e_s"]["mean"], rel=0.3)
