"""What an engine process decides while it serves: its batch size, whose slot is taken, what starts a batch."""

from collections.abc import Callable
from pathlib import Path

import pytest

from inference.messages import BatchEvent, LatencyTarget, ReplicaStatus, RequestEvent
from tests.integration.engines import Engines
from tests.integration.fleet import FleetClient
from tests.patience import PATIENCE_S


@pytest.fixture
def checkpoint(long_checkpoint: Path) -> Path:
    return long_checkpoint


def read_status(fleet: FleetClient) -> ReplicaStatus:
    """What the engine last said of itself; a fast one has finished before it says anything."""
    fleet.until(lambda: fleet.status("gpu-0"))
    status = fleet.status("gpu-0")
    assert status is not None
    return status


def keep_busy(fleet: FleetClient, condition: Callable[[], object]) -> None:
    """Have 40 requests unfinished until the condition holds, however fast the engine is."""

    def is_met() -> bool:
        unfinished = sum(not answer.finish for answer in fleet.answers.values())
        for number in range(len(fleet.answers), len(fleet.answers) + 40 - unfinished):
            fleet.submit(f"r{number}", [5 + number % 200, 6], 60)
        return bool(condition())

    fleet.until(is_met)


def test_a_batch_shrinks_when_its_sla_is_missed_and_another_strategy_takes_over_while_it_serves(
    engines: Engines, fleet: FleetClient
) -> None:
    impossible = [LatencyTarget("acme", 3, None, 0.002)]
    engine = engines.start(sizing="latency_first", targets=impossible)
    keep_busy(fleet, lambda: read_status(fleet).max_batch_size < 6)
    assert read_status(fleet).size_changes[0].reason.startswith("latency_first: p99 is ")
    for arguments, ok in (
        ({"name": "throughput_first", "params": {"initial": 7}}, True),
        ({"name": "warp"}, False),
        ({"name": "balanced", "params": {"largest": 0}}, False),
    ):
        ack = engine.send("sizing", arguments, timeout_s=PATIENCE_S)
        assert (ack.ok, bool(ack.error)) == (ok, not ok)
    fleet.until(lambda: read_status(fleet).sizing == "throughput_first")
    status = read_status(fleet)
    first = next(change for change in status.size_changes if change.reason.startswith("throughput_first"))
    assert (first.reason, first.batch_size) == ("throughput_first: the initial size", 7)
    assert status.sizing_params["initial"] == 7
    fleet.until_finished()
    fleet.until(lambda: any(event.sizing == "throughput_first" for event in fleet.events(BatchEvent)))
    changes = [change for event in fleet.events(BatchEvent) for change in event.size_changes]
    assert changes[0].batch_size < 8
    assert 7 in [change.batch_size for change in changes]


def test_a_higher_request_takes_a_slot_under_a_policy_by_priority_and_no_token_is_lost(
    engines: Engines, fleet: FleetClient
) -> None:
    fleet.use_policy("priority")
    engines.start(max_batch_size=2)
    fleet.submit("low 1", [5, 6], 1000, priority=5)
    fleet.submit("low 2", [7, 8], 1000, priority=4)
    fleet.until(lambda: all(len(answer.token_ids) > 20 for answer in fleet.answers.values()))
    fleet.submit("urgent", [9, 6], 10, priority=1)
    fleet.until(lambda: fleet.answers["urgent"].finish)
    assert not fleet.answers["low 1"].finish
    fleet.until_finished()
    fleet.until(lambda: read_status(fleet).slot_preemptions == 1)
    fleet.until(lambda: len(fleet.events(RequestEvent)) == 3)
    low = next(event for event in fleet.events(RequestEvent) if event.id == "low 1")
    assert [mark.kind for mark in low.marks] == ["started", "displaced", "resumed"]
    assert 20 < low.marks[1].tokens == low.marks[2].tokens < 1000
    assert sum(num for _, num in low.bursts) == 1000
    for name, prompt in (("low 1", [5, 6]), ("low 2", [7, 8])):
        fleet.submit(f"{name} alone", prompt, 1000)
        fleet.until_finished()
        assert fleet.answers[name].token_ids == fleet.answers[f"{name} alone"].token_ids
        assert fleet.answers[name].attempts == {1}


def test_nobody_takes_a_slot_under_fifo_equal_prompts_share_blocks_and_triggers_start_batches(
    engines: Engines, fleet: FleetClient, checkpoint: Path
) -> None:
    engine = engines.start(max_batch_size=1)
    prompt = list(range(5, 75))
    fleet.submit("first", prompt, 1000, priority=5)
    fleet.until(lambda: len(fleet.answers["first"].token_ids) > 5)
    fleet.submit("critical", prompt, 5, priority=0)
    fleet.until(lambda: fleet.answers["critical"].token_ids)
    assert fleet.answers["first"].finish
    fleet.until_finished()
    assert fleet.answers["critical"].token_ids == fleet.answers["first"].token_ids[:5]
    fleet.until(lambda: read_status(fleet).prefix_hit_tokens == 64)
    assert read_status(fleet).slot_preemptions == 0
    fleet.until(lambda: sum(event.prefix_hit_tokens for event in fleet.events(BatchEvent)) == 64)

    triggers = {"any": [{"urgent_alone": 0}, {"size": 3}]}
    deployment = {"name": Engines.model, "path": str(checkpoint), "mode": "dynamic", "triggers": triggers}
    assert engine.send("deployment", deployment, PATIENCE_S).ok
    for name in ("a", "b"):
        fleet.submit(name, [5, 6], 5)
    fleet.submit("urgent", [5, 7], 5, priority=0)
    fleet.until(lambda: fleet.answers["urgent"].finish)
    assert not fleet.answers["a"].token_ids
    fleet.submit("c", [5, 8], 5)
    fleet.until_finished()
    fleet.until(lambda: read_status(fleet).triggers == {"urgent": 1, "size": 1})
    assert (read_status(fleet).trigger, read_status(fleet).trigger_reason) == ("size", "3 of 3 wait")
    fleet.until(lambda: sum(event.triggers.get("size", 0) for event in fleet.events(BatchEvent)) == 1)
