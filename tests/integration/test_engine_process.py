"""The engine process: requests in by the queue, answers out by the reply stream, through kill, cancel and control."""

import time
from pathlib import Path
from typing import get_args

import redis

from inference.messages import BatchEvent, BatchMode, RequestEvent
from scheduling.core.sequence import SamplingParams
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import execute
from tests.integration.engines import Engines
from tests.integration.fleet import FleetClient
from tests.patience import PATIENCE_S


def test_requests_of_a_batch_are_answered_recorded_and_settled(
    engines: Engines, fleet: FleetClient, store: redis.Redis, keys: Keys
) -> None:
    limits = TenantLimits(keys)
    for i in range(20):
        acquired = limits.acquire("acme", f"r{i}", rpm=None, tpm=10_000, concurrency=50, tokens=13 + i)
        assert execute(store, acquired).ok
    engines.start()
    for i in range(20):
        fleet.submit(f"r{i}", [5 + i, 6, 7], 10 + i)
    fleet.until_finished()
    for i in range(20):
        answer = fleet.answers[f"r{i}"]
        assert len(answer.token_ids) == 10 + i
        assert answer.finish is not None
        assert (answer.finish.reason, answer.finish.prompt_tokens) == ("length", 3)
        record = execute(store, fleet.queue.record(f"r{i}"))
        assert record is not None
        assert (record.state, record.output, record.num_tokens) == ("finished", answer.text, 10 + i)
    fleet.until(lambda: len(fleet.events(RequestEvent)) == 20 and fleet.events(BatchEvent))
    event = fleet.events(RequestEvent)[0]
    assert event.claimed_s is not None
    assert event.first_token_s is not None
    assert event.arrival_s <= event.claimed_s <= event.first_token_s <= event.finished_s
    assert execute(store, limits.usage("acme")).running == 0
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and s.finished == {"length": 20})
    status = fleet.until_state("gpu-0", "ready")
    assert status.output_tokens == sum(10 + i for i in range(20))
    assert status.telemetry is not None
    assert status.telemetry.source == "host"


def test_a_cache_for_which_there_is_no_memory_is_said_and_not_tried_over_and_over(
    engines: Engines, fleet: FleetClient
) -> None:
    engine = engines.start(kv_memory_bytes=2**52)
    status = fleet.until_state("gpu-0", "failed")
    assert "and the KV cache 4194304.00 GiB" in status.detail
    assert "lower kv_memory_bytes" in status.detail
    assert not engine.ended.is_set()
    engine.tell("stop", {"drain_s": 0})
    assert engine.wait(PATIENCE_S) == 1
    assert engine.notice is not None
    assert (engine.notice.state, engine.notice.detail) == ("failed", status.detail)


def test_a_batch_survives_kill_9_with_each_token_once_and_the_same_text(
    engines: Engines, fleet: FleetClient, store: redis.Redis
) -> None:
    def submit(prefix: str) -> None:
        for i in range(50):
            fleet.submit(f"{prefix}{i}", [5 + i, 6, 7 + i % 3], 190 + i)

    engine = engines.start()
    submit("calm-")
    fleet.until_finished()
    submit("killed-")
    fleet.until(lambda: sum(len(fleet.answers[f"killed-{i}"].token_ids) for i in range(50)) > 600)
    engine.kill()
    assert engine.wait(PATIENCE_S) is not None
    assert not all(fleet.answers[f"killed-{i}"].finish for i in range(50))
    assert execute(store, fleet.queue.expire(now=time.time() + 3600)), "its lease ends"
    engines.start()
    fleet.until_finished()
    for i in range(50):
        calm, killed = fleet.answers[f"calm-{i}"], fleet.answers[f"killed-{i}"]
        assert (killed.token_ids, killed.text) == (calm.token_ids, calm.text)
    assert max(max(answer.attempts) for answer in fleet.answers.values()) == 2


def test_commands_are_obeyed_between_two_steps_and_not_after_the_batch(engines: Engines, fleet: FleetClient) -> None:
    engine = engines.start()
    for i in range(100):
        fleet.submit(f"r{i}", [5 + i, 6], 200)
    fleet.until(lambda: len(fleet.answers["r0"].token_ids) > 10)
    for command, arguments, ok in (
        ("set_batch_size", {"max_batch_size": 4}, True),
        ("set_batch_size", {"max_batch_size": 0}, False),
        ("set_mode", {"mode": "dynamic"}, True),
        ("set_mode", {"mode": "warp"}, False),
        ("policy", {"name": "fair", "revision": 7}, True),
    ):
        ack = engine.send(command, arguments, timeout_s=PATIENCE_S)  # type: ignore[arg-type]
        assert ack.ok is ok
        assert bool(ack.error) is not ok
    fleet.read()
    assert not all(answer.finish for answer in fleet.answers.values()), "it waited for the batch"
    fleet.until(lambda: (s := fleet.status("gpu-0")) is not None and (s.policy_revision, s.max_batch_size) == (7, 4))
    fleet.until_finished()


def test_a_paused_engine_finishes_what_runs_and_claims_again_when_resumed(engines: Engines, fleet: FleetClient) -> None:
    engine = engines.start()
    fleet.submit("running", [5, 6], 200)
    fleet.until(lambda: fleet.answers["running"].token_ids)
    assert engine.send("pause", {}, PATIENCE_S).state == "paused"
    fleet.submit("waiting", [5, 7], 5)
    fleet.until(lambda: fleet.answers["running"].finish)
    fleet.until_state("gpu-0", "paused")
    assert not fleet.answers["waiting"].token_ids
    assert engine.send("resume", {}, PATIENCE_S).state == "ready"
    fleet.until_finished()


def test_a_drained_engine_gives_back_what_has_not_begun_and_stops(engines: Engines, fleet: FleetClient) -> None:
    engine = engines.start(mode="serial")
    for i in range(8):
        fleet.submit(f"r{i}", [5, 6 + i], 240)
    fleet.until(lambda: fleet.answers["r0"].token_ids)
    assert engine.send("drain", {}, PATIENCE_S).state in ("draining", "stopped")
    fleet.until_state("gpu-0", "stopped")
    fleet.until(lambda: fleet.answers["r0"].finish)
    assert not fleet.answers["r7"].token_ids
    other = engines.start("gpu-1")
    fleet.until_finished()
    for process in (engine, other):
        process.tell("stop", {"drain_s": PATIENCE_S})
        assert process.wait(PATIENCE_S) == 0


def test_an_engine_told_to_stop_now_gives_its_requests_back_for_another_to_finish(
    engines: Engines, fleet: FleetClient
) -> None:
    engine = engines.start()
    for i in range(8):
        fleet.submit(f"r{i}", [5, 6 + i], 240)
    fleet.until(lambda: all(answer.token_ids for answer in fleet.answers.values()))
    engine.tell("stop", {"drain_s": 0})
    assert engine.wait(PATIENCE_S) == 0
    engines.start("gpu-1")
    fleet.until_finished()
    assert all(len(answer.token_ids) == 240 for answer in fleet.answers.values())


def test_a_cancelled_request_stops_long_before_its_end(
    engines: Engines, fleet: FleetClient, store: redis.Redis, long_checkpoint: Path
) -> None:
    engines.start(path=long_checkpoint)
    fleet.submit("cancelled", [5, 6], 4000)
    fleet.submit("kept", [5, 7], 240)
    fleet.until(lambda: fleet.answers["cancelled"].token_ids)
    execute(store, fleet.queue.cancel("cancelled"))
    fleet.until_finished()
    finish = fleet.answers["cancelled"].finish
    assert finish is not None
    assert finish.reason == "cancelled"
    assert len(fleet.answers["cancelled"].token_ids) < 3000
    assert len(fleet.answers["kept"].token_ids) == 240


def test_a_request_that_cannot_run_ends_alone(engines: Engines, fleet: FleetClient) -> None:
    fleet.submit("good", [5, 6], 20)
    fleet.submit("too long", [5] * 250, 20)
    fleet.submit("no such token", [5, 10_000], 20)
    fleet.submit("empty", [], 20)
    fleet.submit("no such bias", [5, 6], 20, sampling=SamplingParams(temperature=0.0, logit_bias=((10_000, 1.0),)))
    engines.start()
    fleet.until_finished()
    codes = {name: answer.finish.error_code for name, answer in fleet.answers.items() if answer.finish}
    assert codes == {
        "good": "",
        "too long": "context_length_exceeded",
        "no such token": "bad_request",
        "empty": "bad_request",
        "no such bias": "bad_request",
    }
    assert len(fleet.answers["good"].token_ids) == 20


def test_a_body_that_cannot_be_read_fails_its_record_alone(
    engines: Engines, fleet: FleetClient, store: redis.Redis
) -> None:
    fleet.submit("garbled", [5], 5, body=b"\xc1")
    fleet.submit("good", [5, 6], 20)
    engines.start()
    fleet.until(lambda: fleet.answers["good"].finish)
    record = execute(store, fleet.queue.record("garbled"))
    assert record is not None
    assert record.state == "failed"


def test_a_request_that_has_ended_several_workers_is_given_up(
    engines: Engines, fleet: FleetClient, store: redis.Redis
) -> None:
    fleet.submit("poison", [5, 6], 20)
    for i in range(3):
        claimed = execute(store, fleet.queue.claim(f"dead-{i}", max_requests=1, max_tokens=99, lease_s=60))
        assert claimed.requests
        execute(store, fleet.queue.release(f"dead-{i}", failed=True))
    engines.start()
    fleet.until_finished()
    finish = fleet.answers["poison"].finish
    assert finish is not None
    assert (finish.reason, finish.error_code) == ("error", "too_many_attempts")


def test_workers_that_end_in_good_order_do_not_count_against_a_request(
    engines: Engines, fleet: FleetClient, store: redis.Redis
) -> None:
    fleet.submit("patient", [5, 6], 20)
    for i in range(5):
        assert execute(store, fleet.queue.claim(f"calm-{i}", max_requests=1, max_tokens=99, lease_s=60)).requests
        execute(store, fleet.queue.release(f"calm-{i}"))
    engines.start()
    fleet.until_finished()
    assert len(fleet.answers["patient"].token_ids) == 20


def test_stop_strings_end_a_request_and_do_not_appear(engines: Engines, fleet: FleetClient) -> None:
    engines.start()
    fleet.submit("whole", [5, 6], 100)
    fleet.until_finished()
    text = fleet.answers["whole"].text
    stop = text[40:43]
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, stop=(stop,))
    fleet.submit("stopped", [5, 6], 100, sampling=sampling)
    fleet.until_finished()
    finish = fleet.answers["stopped"].finish
    assert finish is not None
    assert finish.reason == "stop"
    assert fleet.answers["stopped"].text == text[: text.index(stop)]


def test_every_mode_gives_the_same_tokens(engines: Engines, fleet: FleetClient) -> None:
    engine = engines.start()
    assert engine.ready.wait(PATIENCE_S)
    for mode in get_args(BatchMode):
        assert engine.send("set_mode", {"mode": mode}, PATIENCE_S).ok
        for i in range(12):
            fleet.submit(f"{mode}-{i}", [5 + i, 6], 8 + i)
        fleet.until_finished()
    for i in range(12):
        assert len({tuple(fleet.answers[f"{mode}-{i}"].token_ids) for mode in get_args(BatchMode)}) == 1


def test_an_engine_ends_when_its_parent_closes_the_pipe(engines: Engines, fleet: FleetClient) -> None:
    engine = engines.start()
    fleet.submit("r", [5, 6], 240)
    fleet.until(lambda: fleet.answers["r"].token_ids)
    engine.hang_up()
    assert engine.wait(PATIENCE_S) == 0
    engines.start("gpu-1")
    fleet.until_finished()


def test_a_broken_checkpoint_is_a_failed_status_with_a_sentence(
    engines: Engines, fleet: FleetClient, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = engines.start(path=tmp_path)
    status = fleet.until_state("gpu-0", "failed")
    assert str(tmp_path) in status.detail
    assert engine.wait(0) is None
    engine.tell("stop", {})
    assert engine.wait(PATIENCE_S) == 1
