"""Replicas as the database knows them, and orders to them."""

from typing import Any

import msgspec
import pytest
import redis
from django.contrib.auth.models import User

from inference.messages import ReplicaStatus, Telemetry
from inference.models import Replica
from inference.services import announce_policy, control_replicas, record_replicas
from scheduling.keys import Keys
from scheduling.models import OperatorAction, PolicyRevision

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]
NOW_S = 1_760_000_000.0


def report(store: redis.Redis, keys: Keys, name: str, **changes: Any) -> None:
    values: dict[str, Any] = {
        "replica": name,
        "model": "demo",
        "host": "here",
        "pid": 1,
        "state": "ready",
        "time_s": NOW_S,
        "started_s": NOW_S - 60,
        "telemetry": Telemetry(source="host", device="2 cores"),
    }
    store.set(keys.replica(name), msgspec.msgpack.encode(ReplicaStatus(**values | changes)))
    store.zadd(keys.replicas, {name: NOW_S})


def test_replicas_are_recorded_while_they_report_and_lost_when_silent(store: redis.Redis, keys: Keys) -> None:
    report(store, keys, "gpu-0")
    report(store, keys, "gpu-1", state="stopped")
    assert record_replicas(store, keys, now_s=NOW_S) == 2
    row = Replica.objects.get(name="gpu-0")
    assert (row.model, row.host, row.device, row.state) == ("demo", "here", "2 cores", "ready")
    store.delete(keys.replica("gpu-0"), keys.replica("gpu-1"))
    assert record_replicas(store, keys, now_s=NOW_S + 5) == 0
    assert Replica.objects.get(name="gpu-0").state == "ready"
    record_replicas(store, keys, now_s=NOW_S + 15)
    assert dict(Replica.objects.values_list("name", "state")) == {"gpu-0": "lost", "gpu-1": "stopped"}
    report(store, keys, "gpu-0", time_s=NOW_S + 20)
    record_replicas(store, keys, now_s=NOW_S + 20)
    assert Replica.objects.get(name="gpu-0").state == "ready"


class Recorder:
    """Takes the place of the broker: what was sent, and an answer for each."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[str], str, dict[str, Any]]] = []

    def __call__(self, replicas: list[str], command: str, **arguments: Any) -> dict[str, Any]:
        self.sent.append((replicas, command, arguments))
        return {name: {"ok": True, "applied_ms": 1.0} for name in replicas}


def test_only_replicas_of_the_model_are_told_of_its_policy(store: redis.Redis, keys: Keys) -> None:
    report(store, keys, "gpu-0")
    report(store, keys, "gpu-1", model="other")
    send = Recorder()
    acks = announce_policy(PolicyRevision(model="demo", revision=4, name="fair"), send)
    assert send.sent == [(["gpu-0"], "policy", {"revision": 4, "name": "fair"})]
    assert acks == {"gpu-0": {"ok": True, "applied_ms": 1.0}}


def test_an_order_to_replicas_is_written_down_with_its_answers(db: None) -> None:
    actor = User.objects.create_user("olga")
    send = Recorder()
    given: dict[str, Any] = {"actor": actor, "reason": "test", "max_batch_size": 8}
    control_replicas(replicas=["gpu-0"], command="set_batch_size", send=send, **given)
    assert send.sent == [(["gpu-0"], "set_batch_size", {"max_batch_size": 8})]
    asked, answered = OperatorAction.objects.order_by("id")
    assert (asked.action, asked.target, asked.actor, asked.reason) == ("replica.set_batch_size", "gpu-0", actor, "test")
    assert asked.after == {"max_batch_size": 8}
    assert (answered.action, answered.actor) == ("replica.answer", actor)
    assert answered.after["acknowledgements"]["gpu-0"]["ok"]
