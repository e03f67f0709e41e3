"""History reaches the database exactly once, whatever fails on the way."""

import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import redis
from django.db import DataError, OperationalError, connection, connections

from inference.historian import Historian
from inference.messages import BatchEvent, HistoryEvent, RequestEvent, SizeChange, Telemetry
from inference.models import BatchRecord, HistoryCheckpoint, RequestRecord
from scheduling.keys import Keys

pytestmark = pytest.mark.django_db(transaction=True)
NOW_S = 1_760_000_000.25


def request_event(request_id: str, **changes: Any) -> RequestEvent:
    values: dict[str, Any] = {
        "id": request_id,
        "model": "demo",
        "tenant": "acme",
        "priority": 3,
        "endpoint": "completions",
        "state": "finished",
        "finish_reason": "stop",
        "arrival_s": NOW_S,
        "claimed_s": NOW_S + 0.5,
        "first_token_s": NOW_S + 0.75,
        "finished_s": NOW_S + 2,
        "prompt_tokens": 12,
        "completion_tokens": 34,
        "max_tokens": 64,
        "replica": "gpu-0",
        "policy": "fair",
        "policy_revision": 7,
    }
    return RequestEvent(**values | changes)


def batch_event(second_s: int, **changes: Any) -> BatchEvent:
    values: dict[str, Any] = {
        "replica": "gpu-0",
        "model": "demo",
        "second_s": second_s,
        "steps": 40,
        "batch_size_mean": 7.5,
        "batch_size_max": 16,
        "prompt_tokens": 100,
        "output_tokens": 600,
        "step_ms_mean": 24.5,
        "step_ms_max": 61.0,
        "kv_blocks_used": 80,
        "kv_blocks_total": 512,
        "preemptions": 1,
        "mode": "continuous",
        "policy": "fair",
        "policy_revision": 7,
        "telemetry": Telemetry(source="host", device="2 cores", utilization_percent=93.0, throttle_reasons=["heat"]),
    }
    return BatchEvent(**values | changes)


def send(store: redis.Redis, keys: Keys, events: Sequence[HistoryEvent], per_entry: int = 3) -> None:
    with store.pipeline() as pipe:
        for start in range(0, len(events), per_entry):
            pipe.xadd(keys.history, {"m": msgspec.msgpack.encode(events[start : start + per_entry])})
        pipe.execute()


def written() -> list[str]:
    return sorted(RequestRecord.objects.values_list("request_id", flat=True))


def test_events_become_rows(store: redis.Redis, keys: Keys) -> None:
    send(store, keys, [request_event("r1", user="u\0ser"), batch_event(1_760_000_001)])
    assert Historian(store, keys).run_once() == 2
    row = RequestRecord.objects.get()
    assert (row.request_id, row.user, row.policy_revision, row.ttft_s, row.e2e_s) == ("r1", "user", 7, 0.75, 2.0)
    batch = BatchRecord.objects.get()
    assert (batch.second.timestamp(), batch.utilization_percent, batch.throttle_reasons) == (
        1_760_000_001,
        93,
        ["heat"],
    )


def test_what_is_written_is_trimmed_and_never_written_again(store: redis.Redis, keys: Keys) -> None:
    historian = Historian(store, keys, max_entries=4)
    ids = [f"r{i:03}" for i in range(40)]
    send(store, keys, [request_event(i) for i in ids])
    assert historian.drain(budget_s=30) == 40
    assert written() == ids
    assert store.xlen(keys.history) == 1
    assert historian.drain(budget_s=30) == 0
    checkpoint = HistoryCheckpoint.objects.get()
    assert (checkpoint.num_events, checkpoint.num_malformed) == (40, 0)


class Killed(BaseException):
    """Ends a run where a kill would, past every handler."""


class DyingHistorian(Historian):
    """Ends after its rows are inserted, before the commit."""

    def _insert(self, rows: Sequence[Any]) -> int:
        super()._insert(rows)
        raise Killed


def test_an_end_between_insert_and_commit_loses_and_doubles_nothing(store: redis.Redis, keys: Keys) -> None:
    ids = [f"r{i:03}" for i in range(30)]
    send(store, keys, [request_event(i) for i in ids])
    Historian(store, keys, max_entries=3).run_once()
    with pytest.raises(Killed):
        DyingHistorian(store, keys).run_once()
    assert len(written()) == 9
    Historian(store, keys).drain(budget_s=30)
    assert written() == ids
    assert HistoryCheckpoint.objects.get().num_events == 30


class ForgetfulRedis(redis.Redis):
    """Loses its connection when asked to trim."""

    def xtrim(self, *args: Any, **kwargs: Any) -> Any:
        raise redis.ConnectionError("gone")


def test_an_end_between_commit_and_trim_doubles_nothing(store: redis.Redis, redis_url: str, keys: Keys) -> None:
    send(store, keys, [request_event("r1"), request_event("r2")])
    with ForgetfulRedis.from_url(redis_url) as forgetful, pytest.raises(redis.ConnectionError):
        Historian(forgetful, keys).run_once()
    assert Historian(store, keys).run_once() == 0
    assert written() == ["r1", "r2"]


def test_two_historians_at_once_write_each_event_once(store: redis.Redis, keys: Keys) -> None:
    ids = [f"r{i:04}" for i in range(600)]
    send(store, keys, [request_event(i) for i in ids])
    counts: list[int] = []
    start = threading.Barrier(3)

    def work() -> None:
        try:
            start.wait(10)
            counts.append(Historian(store, keys, max_entries=7).drain(budget_s=60))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    Historian(store, keys).drain(budget_s=60)
    assert written() == ids
    assert sum(counts) <= 600
    assert HistoryCheckpoint.objects.get().num_events == 600


def test_malformed_entries_are_counted_and_skipped(store: redis.Redis, keys: Keys) -> None:
    send(store, keys, [request_event("r1")])
    store.xadd(keys.history, {"m": b"\xc1 not MessagePack"})
    store.xadd(keys.history, {"other": b"field"})
    store.xadd(keys.history, {"m": msgspec.msgpack.encode([{"type": "weather", "rain": True}, request_event("r2")])})
    send(store, keys, [request_event("r3", prompt_tokens=-1), request_event("r4", finished_s=float("nan"))])
    send(store, keys, [request_event("r5", priority=2**40), request_event("r6")])
    send(store, keys, [batch_event(1_760_000_001, step_ms_max=float("inf"))])
    assert Historian(store, keys).run_once() == 3
    assert written() == ["r1", "r2", "r6"]
    assert HistoryCheckpoint.objects.get().num_malformed == 7


def test_a_row_the_database_refuses_does_not_hold_up_the_others(store: redis.Redis, keys: Keys) -> None:
    ids = [f"r{i:03}" for i in range(20)]
    send(store, keys, [request_event(i) for i in ids])

    def refuse_one(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if "r013" in str(params) and sql.startswith("INSERT"):
            raise DataError("out of range")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(refuse_one):
        assert Historian(store, keys).run_once() == 19
    assert written() == [i for i in ids if i != "r013"]
    checkpoint = HistoryCheckpoint.objects.get()
    assert (checkpoint.num_events, checkpoint.num_malformed) == (19, 1)


def test_an_event_sent_twice_makes_one_row(store: redis.Redis, keys: Keys) -> None:
    send(store, keys, [request_event("r1"), batch_event(1_760_000_001)])
    send(store, keys, [request_event("r1"), batch_event(1_760_000_001)])
    Historian(store, keys).run_once()
    assert (RequestRecord.objects.count(), BatchRecord.objects.count()) == (1, 1)


def test_history_catches_up_after_the_database_was_away(store: redis.Redis, keys: Keys) -> None:
    send(store, keys, [request_event("r1")])

    def away(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        raise OperationalError("the database went away")

    with connection.execute_wrapper(away), pytest.raises(OperationalError):
        Historian(store, keys).run_once()
    send(store, keys, [request_event("r2")])
    assert Historian(store, keys).run_once() == 2
    assert written() == ["r1", "r2"]


def test_history_goes_on_after_redis_lost_its_data_and_its_clock_went_back(store: redis.Redis, keys: Keys) -> None:
    send(store, keys, [request_event("r1")])
    historian = Historian(store, keys)
    historian.run_once()
    store.delete(keys.history)
    store.xadd(keys.history, {"m": msgspec.msgpack.encode([request_event("r2")])}, id="5-0")
    assert historian.run_once() == 0
    assert historian.run_once() == 1
    assert written() == ["r1", "r2"]


def test_writing_stops_when_its_time_is_over(store: redis.Redis, keys: Keys) -> None:
    send(store, keys, [request_event(f"r{i}") for i in range(9)])
    ticks = iter([0.0, 0.5, 1.5])
    assert Historian(store, keys, max_entries=1, clock=lambda: next(ticks)).drain(budget_s=1) == 6


def test_what_an_engine_decided_in_a_second_is_in_its_row(store: redis.Redis, keys: Keys) -> None:
    decided = {
        "max_batch_size": 6,
        "sizing": "latency_first",
        "size_changes": [SizeChange(NOW_S, 6, "p99 is 140% of its target")],
        "triggers": {"urgent": 2},
        "trigger_reason": "a request of priority high is there",
        "prefix_tokens": 900,
        "prefix_hit_tokens": 320,
        "swapped_out_blocks": 12,
        "swapped_in_blocks": 11,
        "draft_tokens": 40,
        "accepted_tokens": 25,
    }
    send(store, keys, [batch_event(1_760_000_000, **decided)])
    assert Historian(store, keys).run_once() == 1
    row = BatchRecord.objects.get()
    stored = {name: getattr(row, name) for name in decided}
    assert stored == decided | {"size_changes": [[NOW_S, 6, "p99 is 140% of its target"]]}
