"""Deployments as operators keep them and engines read them: sizing, triggers and SLAs, checked when stored."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command

from controlplane.config import Config
from controlplane.demo import offer_upstream
from inference.directory import load_directory, publish_deployments
from inference.messages import DeploymentSpec, LatencyTarget
from inference.models import ModelDeployment
from inference.services import save_deployment
from scheduling.keys import Keys
from scheduling.models import OperatorAction, ServiceLevel, Tenant
from tests.checkpoints import make_checkpoint, make_tokenizer

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("installation")]


def test_engines_read_how_batches_form_and_what_the_slas_promise(store: redis.Redis, keys: Keys) -> None:
    deployment = ModelDeployment(name="m", path="/m")
    trigger = {"any": [{"urgent": 1}, {"size": 8}]}
    changes = {"sizing": "latency_first", "sizing_params": {"largest": 32}, "triggers": trigger}
    save_deployment(deployment=deployment, changes={**changes, "prefix_cache": "per_tenant", "max_batch_size": 8})
    ServiceLevel.objects.create(tenant=Tenant.objects.create(name="acme"), priority=1, ttft_ms=200)
    ServiceLevel.objects.create(priority=3, ttft_ms=500, e2e_ms=9000, tpot_ms=40)
    publish_deployments(store, keys, load_directory())
    packed: Any = store.hget(keys.deployments, "m")
    spec = msgspec.json.decode(packed, type=DeploymentSpec)
    assert (spec.sizing, spec.sizing_params, spec.triggers) == ("latency_first", {"largest": 32}, trigger)
    assert (spec.prefix_cache, spec.long_prefill_threshold) == ("per_tenant", 512)
    promised = [LatencyTarget("", 3, 0.5, 9.0, 0.04), LatencyTarget("acme", 1, 0.2)]
    assert sorted(spec.targets, key=lambda target: target.tenant) == promised


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sizing": "largest"}, "sizing"),
        ({"sizing": "balanced", "sizing_params": {"gain": 99}}, "sizing_params"),
        ({"sizing_params": ["initial"]}, "sizing_params"),
        ({"triggers": {"sometimes": 1}}, "triggers"),
        ({"triggers": "size"}, "triggers"),
        ({"prefix_cache": "sometimes"}, "prefix_cache"),
        ({"speculation": "model"}, "draft_path"),
        ({"speculation": "model", "draft_path": "/nowhere"}, "draft_path"),
    ],
)
def test_what_no_engine_could_use_is_not_stored(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        save_deployment(deployment=ModelDeployment(name="m", path="/m"), changes=changes)
    assert field in refusal.value.message_dict
    assert not ModelDeployment.objects.exists()


def test_a_draft_model_has_the_vocabulary_of_the_model_it_guesses_for(tmp_path: Path) -> None:
    for name, tokenizer in (("target", "bytes"), ("draft", "bytes"), ("stranger", "metaspace")):
        make_checkpoint("llama", tmp_path / name)
        make_tokenizer(tokenizer, tmp_path / name)
    make_checkpoint("llama", tmp_path / "wider", vocab_size=400)
    make_tokenizer("bytes", tmp_path / "wider")

    def save(draft: str) -> ModelDeployment:
        changes = {"path": str(tmp_path / "target"), "speculation": "model", "draft_path": str(tmp_path / draft)}
        save_deployment(deployment=(deployment := ModelDeployment(name=draft)), changes=changes)
        return deployment

    assert save("draft").to_spec().draft_path == str(tmp_path / "draft")
    for draft, sentence in (
        ("stranger", "name different tokens by the same ids"),
        ("wider", "a vocabulary of 400 tok"),
    ):
        with pytest.raises(ValidationError, match=sentence):
            save(draft)


def test_an_upstream_is_offered_by_command_and_gives_a_checkpoints_name_another_server(
    tmp_path: Path, store: redis.Redis, keys: Keys
) -> None:
    ModelDeployment.objects.create(name="m", path="/m", mode="dynamic", max_batch_size=64)
    command = [
        "m",
        "http://127.0.0.1:9",
        "--model",
        "org/m",
        "--key-variable",
        "M_API_KEY",
        "--most",
        "8",
        "--gap-s",
        "5",
    ]
    call_command("add_upstream", *command)
    publish_deployments(store, keys, load_directory())
    packed: Any = store.hget(keys.deployments, "m")
    spec = msgspec.json.decode(packed, type=DeploymentSpec)
    assert (spec.backend, spec.upstream_url, spec.upstream_model) == ("openai", "http://127.0.0.1:9/v1", "org/m")
    assert (spec.upstream_key, spec.upstream_gap_s, spec.path, spec.mode) == ("M_API_KEY", 5, "", "continuous")
    assert (spec.sizing, spec.sizing_params, spec.max_batch_size) == ("gradient", {"largest": 8}, 4)
    call_command("add_upstream", "m", "https://other/v1")
    assert ModelDeployment.objects.get().upstream_model == "org/m", "what is not named stays"
    with pytest.raises(CommandError, match="Only http and https"):
        call_command("add_upstream", "n", "ws://host")
    make_checkpoint("llama", tmp_path)
    make_tokenizer("bytes", tmp_path)
    call_command("add_model", "m", str(tmp_path))
    assert (ModelDeployment.objects.get().backend, ModelDeployment.objects.get().upstream_url) == ("builtin", "")


def test_the_server_of_a_setting_is_offered_once() -> None:
    for _ in range(2):
        offer_upstream(Config.model_construct(upstream="m=its:name@http://host:1"))
    row = ModelDeployment.objects.get()
    assert (row.name, row.upstream_model, row.upstream_url) == ("m", "its:name", "http://host:1/v1")
    assert OperatorAction.objects.count() == 1
    offer_upstream(Config.model_construct(upstream=""))
    assert ModelDeployment.objects.count() == 1
