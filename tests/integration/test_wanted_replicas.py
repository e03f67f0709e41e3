"""Replicas as operators want them: rows, the plan that machines read, room on a machine, who may ask, and the trail."""

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from django.contrib.auth.models import Group, User
from django.test import Client

from inference import replicas
from inference.messages import ReplicaStatus, Telemetry
from inference.models import ModelDeployment, WantedReplica
from inference.plan import Device, Machine, RunningReplica
from inference.replicas import ReplicaError, add_replica, read_plan, remove_replica, restart_replica
from inference.room import HOST_FRACTION, NoRoom, estimate_need
from inference.services import control_replicas, save_deployment
from scheduling.keys import Keys
from scheduling.models import OperatorAction

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]
GIB = 2**30
CPU = Device(name="cpu", label="CPU, 2 cores", memory_total_bytes=8 * GIB, memory_free_bytes=6 * GIB)
GPU = Device(name="GPU-1", label="GPU 0, H100", memory_total_bytes=80 * GIB, memory_free_bytes=79 * GIB)
CONFIG = {
    "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 1000,
    "intermediate_size": 4096, "max_position_embeddings": 1024,
}  # fmt: skip
"""A token's keys and values take 64 KiB in float32, a sequence of the full length 64 MiB."""


@pytest.fixture
def deployment(tmp_path: Path, db: None) -> ModelDeployment:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ModelDeployment.objects.create(
        name="demo", path=str(tmp_path), num_parameters=GIB // 4, max_batch_size=4, step_tokens=16
    )


def machine_with(*running: RunningReplica, **fields: Any) -> Machine:
    now_s = time.time()
    usual: dict[str, Any] = {
        "name": "here",
        "host": "h",
        "pid": 1,
        "time_s": now_s,
        "started_s": now_s,
        "devices": [CPU],
    }
    return Machine(**(usual | {"replicas": list(running)} | fields))


def own(name: str = "gpu-0", **fields: Any) -> RunningReplica:
    usual: dict[str, Any] = {"name": name, "own": True, "device": "cpu", "state": "running"}
    return RunningReplica(**(usual | fields))


def tell(store: redis.Redis, keys: Keys, machine: Machine) -> None:
    """Let a machine report."""
    store.set(keys.machine(machine.name), msgspec.msgpack.encode(machine))
    store.zadd(keys.machines, {machine.name: machine.time_s})


def loaded(name: str, held_bytes: int) -> ReplicaStatus:
    telemetry = Telemetry(source="host", device="cpu", process_memory_bytes=held_bytes)
    return ReplicaStatus(
        replica=name, model="demo", host="h", pid=1, state="ready", time_s=1.0, started_s=1.0, telemetry=telemetry,
        kv_blocks_total=64,
    )  # fmt: skip


def test_a_replica_is_added_by_a_row_the_plan_and_a_line_in_the_trail(
    deployment: ModelDeployment, store: redis.Redis, keys: Keys
) -> None:
    row = add_replica(deployment=deployment, machine=machine_with(own("gpu-7")), reason="evening")
    assert (row.name, row.machine, row.device, row.wanted) == ("gpu-8", "here", "cpu", "running")
    plan = read_plan(store, keys)
    assert plan.replicas["gpu-8"].model == "demo"
    assert plan.revision > 0
    action = OperatorAction.objects.get(action="replica.add")
    assert (action.target, action.after["machine"], action.reason) == ("gpu-8", "here", "evening")
    store.delete(keys.plan)
    assert replicas.publish_wanted()
    assert read_plan(store, keys) == plan


def test_a_gpu_goes_before_the_cpu_and_only_what_exists_is_taken(deployment: ModelDeployment) -> None:
    machine = machine_with(devices=[CPU, GPU])
    assert add_replica(deployment=deployment, machine=machine).device == "GPU-1"
    assert add_replica(deployment=deployment, machine=machine, device="cpu").device == "cpu"
    with pytest.raises(NoRoom, match=r"no device GPU-2; it has cpu \(CPU, 2 cores\), GPU-1"):
        add_replica(deployment=deployment, machine=machine, device="GPU-2")


def test_memory_is_not_promised_twice(deployment: ModelDeployment) -> None:
    # 1 GiB of weights, 0.25 of cache, 0.5 of runtime: three are promised 5.3 of 6 GiB before any has taken its own.
    machine = machine_with()
    for name in ("a", "b", "c"):
        add_replica(deployment=deployment, machine=machine, name=name)
    with pytest.raises(NoRoom, match=r"needs 1\.\d\d GiB .*beside what a, b, c may still take.*remove a replica"):
        add_replica(deployment=deployment, machine=machine, name="d")
    assert not WantedReplica.objects.filter(name="d").exists()
    # What they hold is free no more, and promised no more.
    settled = [loaded(name, 2 * GIB) for name in ("a", "b", "c")]
    assert add_replica(deployment=deployment, machine=machine, name="d", statuses=settled).name == "d"


def test_a_model_that_is_larger_than_the_machine_is_refused(deployment: ModelDeployment) -> None:
    deployment.num_parameters = 2 * GIB
    deployment.save()
    with pytest.raises(NoRoom, match=r"CPU, 2 cores: a replica needs 8\.\d+ GiB \(weights 8\.00.*6\.00 GiB are free"):
        add_replica(deployment=deployment, machine=machine_with())


def test_a_draft_model_needs_its_place_too(deployment: ModelDeployment, checkpoint: Path) -> None:
    spec = deployment.to_spec()
    alone = estimate_need(spec, num_parameters=deployment.num_parameters, device=CPU)
    drafted = msgspec.structs.replace(spec, speculation="model", draft_path=str(checkpoint))
    both = estimate_need(drafted, num_parameters=deployment.num_parameters, device=CPU)
    assert both.weights > alone.weights
    assert both.kv_token > alone.kv_token
    assert both.kv > alone.kv


@pytest.mark.parametrize("device", [CPU, GPU])
def test_weights_in_int8_need_a_byte_each_at_least_on_every_device(deployment: ModelDeployment, device: Device) -> None:
    spec = msgspec.structs.replace(deployment.to_spec(), quantization="int8")
    assert 3_000_000 <= estimate_need(spec, num_parameters=3_000_000, device=device).weights < 6_000_000


def test_the_share_of_a_cache_without_a_size_is_the_engines() -> None:
    kv_cache = pytest.importorskip("inference.engine.kv_cache")
    assert kv_cache.HOST_FRACTION == HOST_FRACTION


def test_what_cannot_be_added_is_explained(deployment: ModelDeployment) -> None:
    with pytest.raises(ReplicaError, match="There is a replica gpu-0 already"):
        add_replica(deployment=deployment, machine=machine_with(own()), name="gpu-0")
    with pytest.raises(ReplicaError, match="here has been silent"):
        replicas.find_machine({"here": machine_with(time_s=1.0)}, "here")
    with pytest.raises(ReplicaError, match="no machine attic; there is here"):
        replicas.find_machine({"here": machine_with()}, "attic")
    save_deployment(deployment=deployment, changes={"enabled": False})
    with pytest.raises(ReplicaError, match="not offered"):
        add_replica(deployment=deployment, machine=machine_with())


def test_a_replica_of_the_settings_is_removed_restarted_and_keeps_its_row(
    deployment: ModelDeployment, store: redis.Redis, keys: Keys
) -> None:
    machines = {"here": machine_with(own())}
    remove_replica(name="gpu-0", machines=machines, drain_s=3, reason="night")
    planned = read_plan(store, keys).replicas["gpu-0"]
    assert (planned.wanted, planned.drain_s, planned.model, planned.machine) == ("stopped", 3, "", "here")
    assert replicas.forget_removed({}, read_plan(store, keys)) == 0
    restart_replica(name="gpu-0", machines={"here": machine_with(own(state="stopped"))})
    planned = read_plan(store, keys).replicas["gpu-0"]
    assert (planned.wanted, planned.generation, planned.drain_s) == ("running", 1, None)


@pytest.mark.parametrize("name", ["gpu-9", "no\x00name", "a" * 200, "with space"])
def test_what_no_machine_runs_cannot_be_removed(name: str, db: None) -> None:
    with pytest.raises(ReplicaError, match="No machine runs") as caught:
        remove_replica(name=name, machines={"here": machine_with(own())})
    assert caught.value.missing


def test_one_more_of_an_orchestrators_is_its_next(deployment: ModelDeployment) -> None:
    pod = machine_with(own("pod-0"), name="pod-0", orchestrated=True, devices=[])
    row = add_replica(deployment=deployment, machine=pod)
    assert (row.name, row.machine, row.device) == ("pod-1", "pod-1", "auto")
    assert add_replica(deployment=deployment, machine=pod).name == "pod-2"


def test_a_removed_row_is_forgotten_once_its_machine_runs_it_no_more(
    deployment: ModelDeployment, store: redis.Redis, keys: Keys
) -> None:
    add_replica(deployment=deployment, machine=machine_with(), name="gpu-1")
    draining = own("gpu-1", own=False, state="stopping")
    remove_replica(name="gpu-1", machines={"here": machine_with(draining)})
    plan = read_plan(store, keys)
    for unaware in (machine_with(draining, revision=plan.revision), machine_with(revision=plan.revision - 1)):
        assert replicas.forget_removed({"here": unaware}, plan) == 0
    assert replicas.forget_removed({"here": machine_with(revision=plan.revision)}, plan) == 1
    assert "gpu-1" not in read_plan(store, keys).replicas


def test_what_operators_tell_a_replica_is_kept_until_its_deployment_says_otherwise(
    deployment: ModelDeployment, store: redis.Redis, keys: Keys
) -> None:
    add_replica(deployment=deployment, machine=machine_with(), name="gpu-1")

    def send(names: list[str], command: str, **arguments: Any) -> dict[str, Any]:
        return {name: {"ok": False, "error": "No answer within 2 s."} for name in names}

    control_replicas(replicas=["gpu-1"], command="set_batch_size", send=send, max_batch_size=3)
    control_replicas(replicas=["gpu-1"], command="drain", send=send)
    control_replicas(replicas=["gpu-1"], command="pause", send=send)
    planned = read_plan(store, keys).replicas["gpu-1"]
    assert planned.commands == {"batch size": ("set_batch_size", {"max_batch_size": 3}), "gate": ("pause", {})}
    save_deployment(deployment=deployment, changes={"max_batch_size": 8})
    assert read_plan(store, keys).replicas["gpu-1"].commands == {"gate": ("pause", {})}


@pytest.fixture
def operator(client: Client, db: None) -> Client:
    user = User.objects.create_user("olga", is_staff=True)
    user.groups.add(Group.objects.get(name="operator"))
    client.force_login(user)
    return client


def test_the_api_adds_restarts_and_removes_and_says_what_differs(
    operator: Client, deployment: ModelDeployment, store: redis.Redis, keys: Keys
) -> None:
    tell(store, keys, machine_with(own()))
    save_deployment(deployment=deployment, changes={})
    body = {"model": "demo", "machine": "here", "device": "cpu", "reason": "evening"}

    def post(path: str, body: dict[str, Any]) -> Any:
        return operator.post(f"/api/v1/fleet/replicas{path}", body, content_type="application/json")

    answer = post("", body)
    assert (answer.status_code, answer.json()["name"]) == (201, "gpu-1")
    fleet = operator.get("/api/v1/fleet").json()
    assert fleet["deployments"] == [
        {
            "model": "demo", "wanted": 2, "running": 0,
            "differs": "wanted: 2 replicas, running: 0; starting gpu-0 on here; gpu-1 is about to be started on here.",
        }
    ]  # fmt: skip
    assert [replica["name"] for replica in fleet["replicas"]] == ["gpu-0", "gpu-1"]
    assert fleet["machines"][0]["devices"][0]["name"] == "cpu"
    assert post("/gpu-1/restart", {"reason": "again"}).json()["generation"] == 1
    assert post("/gpu-1/remove", {"reason": "night", "drain_s": 0}).json()["wanted"] == "stopped"
    refusals = {
        (404, "model_not_found"): ("", body | {"model": "nobody"}),
        (400, "no_room"): ("", body | {"device": "GPU-1"}),
        (400, "invalid_value"): ("", body | {"machine": "attic"}),
        (404, "replica_not_found"): ("/gpu-9/remove", {"reason": "night"}),
    }
    for (status, code), (path, wrong) in refusals.items():
        answer = post(path, wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.content


def test_a_viewer_sees_what_differs_and_changes_nothing(client: Client, db: None) -> None:
    user = User.objects.create_user("victor")
    user.groups.add(Group.objects.get(name="viewer"))
    client.force_login(user)
    assert client.get("/api/v1/fleet").status_code == 200
    assert client.post("/api/v1/fleet/replicas/gpu-0/restart", {"reason": "x"}, "application/json").status_code == 403
    assert client.post("/fleet/replicas/gpu-0/restart/", {"reason": "x"}).status_code == 403
    assert not WantedReplica.objects.exists()


def test_the_pages_dialogs_are_answered_at_their_fields(
    operator: Client, deployment: ModelDeployment, store: redis.Redis, keys: Keys
) -> None:
    tell(store, keys, machine_with(own()))
    form = {"model": "demo", "place": "here|cpu", "reason": "evening"}
    cases = {
        "reason": form | {"reason": " "},
        "model": form | {"model": "nobody\0"},
        "place": form | {"place": "attic|cpu"},
        "name": form | {"name": "with space"},
    }
    for field, wrong in cases.items():
        answer = operator.post("/fleet/replicas/", wrong)
        assert answer.status_code in (400, 404), field
        assert field in answer.json()["fields"] or field == "reason"
    assert operator.post("/fleet/replicas/", form).json()["name"] == "gpu-1"
    wrong_limit = operator.post("/fleet/replicas/gpu-1/remove/", {"drain_s": "soon", "reason": "night"})
    assert "whole number of seconds" in wrong_limit.json()["fields"]["drain_s"]
    assert operator.post("/fleet/replicas/gpu-1/remove/", {"drain_s": "", "reason": "night"}).status_code == 200
    assert operator.post("/fleet/replicas/gpu-1/polish/", {"reason": "night"}).status_code == 404


def test_the_admin_asks_the_machines_before_it_wants_a_replica(
    client: Client, deployment: ModelDeployment, store: redis.Redis, keys: Keys
) -> None:
    client.force_login(User.objects.create_superuser("ada", password="x"))
    tell(store, keys, machine_with())
    form = {"name": "gpu-3", "deployment": deployment.pk, "machine": "attic", "device": "auto", "wanted": "running"}
    path = "/admin/inference/wantedreplica/"
    page = client.post(f"{path}add/", form | {"generation": 0})
    assert b"There is no machine attic; there is here." in page.content
    assert client.post(f"{path}add/", form | {"machine": "here", "generation": 0}).status_code == 302
    assert read_plan(store, keys).replicas["gpu-3"].device == "cpu"
    assert b"not heard of" in client.get(path).content
    row = WantedReplica.objects.get()
    assert client.post(f"{path}{row.pk}/delete/", {"post": "yes", "reason": "unused"}).status_code == 302
    assert read_plan(store, keys).replicas == {}
    assert {"wantedreplica.create", "wantedreplica.delete"} <= set(
        OperatorAction.objects.values_list("action", flat=True)
    )
