"""The management commands that make keys and register models."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import redis
from django.core.management import CommandError, call_command
from safetensors.numpy import save_file

from controlplane.config import Config
from inference.directory import load_directory
from inference.management.commands.add_model import OPTIONS
from inference.messages import DeploymentSpec
from inference.models import ModelDeployment
from scheduling.keys import Keys
from scheduling.models import ApiKey, OperatorAction, Tenant

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("installation")]

Capture = pytest.CaptureFixture[str]


def test_create_key_makes_what_is_missing_and_prints_the_key_alone(capsys: Capture) -> None:
    call_command(
        "create_key", tenant="acme", rpm=60, tpm=9000, tpd=50_000, concurrency=4, weight=2.5, max_priority="normal"
    )
    out, err = capsys.readouterr()
    assert err == "Created tenant acme.\n"
    key = load_directory().find_key(out.removesuffix("\n"))
    assert key is not None
    assert (key.tenant, key.max_priority) == ("acme", 3)
    tenant = load_directory().tenants["acme"]
    assert (tenant.rpm, tenant.tpm, tenant.tpd, tenant.concurrency, tenant.weight) == (60, 9000, 50_000, 4, 2.5)


def test_create_key_changes_only_what_is_given(capsys: Capture) -> None:
    call_command("create_key", tenant="acme", rpm=60, weight=2.5)
    call_command("create_key", tenant="acme", rpm=0)
    tenant = load_directory().tenants["acme"]
    assert (tenant.rpm, tenant.weight) == (None, 2.5)
    call_command("create_key", tenant="acme")
    assert ApiKey.objects.count() == 3
    assert len(set(capsys.readouterr().out.split())) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tenant": "A b"}, "A tenant's name has up to 63 lower-case letters"),
        ({"tenant": "acme", "rpm": -1}, "A limit is at least 1"),
        ({"tenant": "acme", "weight": 0.0}, "A weight is at least 0.01."),
        ({"tenant": "acme", "max_priority": "urgent"}, "urgent is no priority; there are critical, realtime"),
        ({"tenant": "acme", "max_priority": "9"}, "9 is no priority"),
    ],
)
def test_create_key_explains_what_it_cannot_do(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(CommandError, match=sentence):
        call_command("create_key", *(f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()))
    assert not Tenant.objects.exists()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with the shape of a checkpoint; nobody runs it here."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 16,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"lm_head.weight": np.zeros((16, 8), np.float32)}, folder / "model.safetensors")
    return folder


def test_add_model_registers_and_publishes(checkpoint: Path, store: redis.Redis, keys: Keys, capsys: Capture) -> None:
    call_command("add_model", "tiny", str(checkpoint), mode="static", batch_size=4, kv_memory_mb=3)
    assert "tiny: LlamaForCausalLM" in capsys.readouterr().out
    published = store.hget(keys.deployments, "tiny")
    assert isinstance(published, bytes)
    spec = msgspec.json.decode(published, type=DeploymentSpec)
    assert (spec.path, spec.mode, spec.max_batch_size, spec.kv_memory_bytes) == (
        str(checkpoint), "static", 4, 3 * 2**20,
    )  # fmt: skip
    call_command("add_model", "tiny", str(checkpoint), mode="continuous")
    row = ModelDeployment.objects.get()
    assert (row.mode, row.max_batch_size, row.num_parameters) == ("continuous", 4, 128)
    actions = list(OperatorAction.objects.order_by("id").values_list("action", flat=True))
    assert actions == ["deployment.create", "deployment.update"]


def test_add_model_has_an_option_for_whatever_of_a_deployment_concerns_a_checkpoint() -> None:
    fields = {field.name for field in ModelDeployment._meta.fields}
    set_otherwise = {"id", "name", "path", "enabled", "created_at", "updated_at", "architecture", "num_parameters"}
    upstream = {name for name in fields if name.startswith("upstream_")} | {"backend"}
    assert set(OPTIONS.values()) == fields - set_otherwise - upstream


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(_without("config.json"), "has no config.json"), (_without("model.safetensors"), "safetensors")],
)
def test_add_model_explains_a_broken_checkpoint(
    checkpoint: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(checkpoint)
    with pytest.raises(CommandError, match=sentence):
        call_command("add_model", "tiny", str(checkpoint))
    assert not ModelDeployment.objects.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": "x"}, {"num_key_value_heads": [2]}, {"head_dim": "x"}, {"vocab_size": True},
        {"max_position_embeddings": "x"}, {"max_position_embeddings": 10**40}, {"eos_token_id": [[1]]},
        {"architectures": 5}, {"architectures": ["LlamaForCausalLM" * 1000]},
    ],
    ids=lambda changes: str(changes)[:60],
)  # fmt: skip
def test_add_model_explains_a_hostile_configuration(checkpoint: Path, changes: dict[str, object]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CommandError, match=r"\."):
        call_command("add_model", "tiny", str(checkpoint))
    assert not ModelDeployment.objects.exists()


def test_add_model_explains_bad_options(checkpoint: Path, installation: Config) -> None:
    with pytest.raises(CommandError, match="A batch holds at least 1"):
        call_command("add_model", "tiny", str(checkpoint), batch_size=0)
    with pytest.raises(CommandError, match="A model's name has up to 128 letters"):
        call_command("add_model", "{tiny}", str(checkpoint))
