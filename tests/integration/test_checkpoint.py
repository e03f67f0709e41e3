"""A checkpoint directory is described without torch, or refused with a sentence."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference.checkpoint import CheckpointError, check_draft, inspect_checkpoint, read_text_config
from inference.messages import DeploymentSpec
from inference.plan import Device
from inference.room import estimate_need
from tests.checkpoints import VOCAB, make_checkpoint, make_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint("llama", tmp_path)
    make_tokenizer("bytes", tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_checkpoint_is_described(folder: Path) -> None:
    info = inspect_checkpoint(folder)
    assert info.architecture == "LlamaForCausalLM"
    assert (info.num_layers, info.hidden, info.heads, info.kv_heads, info.head_dim) == (3, 64, 4, 2, 16)
    assert (info.vocab_size, info.max_model_len, info.dtype) == (VOCAB, 256, "float32")
    assert info.num_parameters == 2 * VOCAB * 64 + 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64) + 64
    assert info.eos_token_ids == {2}
    assert info.has_chat_template
    assert info.kv_bytes_per_token("float32") == 2 * info.kv_bytes_per_token("bfloat16") == 3 * 2 * 2 * 16 * 4


def test_names_of_older_architectures_are_understood(tmp_path: Path) -> None:
    make_checkpoint("gpt2", tmp_path)
    info = inspect_checkpoint(tmp_path, needs_tokenizer=False)
    assert (info.num_layers, info.hidden, info.kv_heads, info.head_dim, info.max_model_len) == (3, 48, 4, 12, 256)


def test_inspection_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from inference.checkpoint import inspect_checkpoint; "
        "from inference.tokenization import Tokenizer; path = Path(sys.argv[1]); "
        "inspect_checkpoint(path); Tokenizer.load(path); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "brings its own model code"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["BertModel"]}, "BertModel, which does not generate text"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"num_hidden_layers": None}, "does not say num_hidden_layers"),
    ],
)
def test_what_cannot_be_served_is_refused(folder: Path, changes: dict[str, object], sentence: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=sentence):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": "x"}, {"num_key_value_heads": [2]}, {"head_dim": "x"}, {"head_dim": -16},
        {"max_position_embeddings": "x"}, {"max_position_embeddings": 1e300}, {"max_position_embeddings": 10**30},
        {"num_hidden_layers": True}, {"num_hidden_layers": 3.0}, {"vocab_size": {}}, {"hidden_size": "64"},
        {"num_attention_heads": 0},
    ],
    ids=str,
)  # fmt: skip
def test_sizes_that_are_no_whole_numbers_are_refused(folder: Path, changes: dict[str, object]) -> None:
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=f"has a {next(iter(changes))} that is no whole number"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("names", [5, "LlamaForCausalLM", {"a": "b"}, [[1]], [None], True])
def test_architectures_that_are_no_list_of_names_are_refused(folder: Path, names: object) -> None:
    change_config(folder, architectures=names)
    with pytest.raises(CheckpointError, match="which does not generate text"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id that is no number"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id that is no number"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id that is no number"),
        ("generation_config.json", [1], "no JSON object"),
        ("tokenizer.json", {"added_tokens": [1]}, "added_tokens without id and content"),
        ("tokenizer.json", {"added_tokens": 7}, "added_tokens without id and content"),
        ("tokenizer.json", {"added_tokens": [{"id": [], "content": "</s>"}]}, "added_tokens without id and content"),
        ("tokenizer.json", {"added_tokens": [{"id": "2", "content": "</s>"}]}, "added_tokens without id and content"),
        ("tokenizer_config.json", "no object", "no JSON object"),
    ],
)
def test_files_beside_the_configuration_are_held_to_their_format(
    folder: Path, name: str, content: object, sentence: str
) -> None:
    (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=sentence):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b""], ids=range(4))
def test_json_that_is_none_or_too_deep_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"not valid JSON|cannot be read"):
        inspect_checkpoint(folder)


def test_an_end_token_below_zero_means_that_there_is_none(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": -1}))
    (folder / "tokenizer_config.json").unlink()
    assert inspect_checkpoint(folder).eos_token_ids == frozenset()


@pytest.mark.parametrize("content", [{"model": [1]}, {"model": None}, {"model": {"vocab": 3}}, {}])
def test_a_draft_model_is_compared_whatever_its_tokenizer_says(
    folder: Path, tmp_path: Path, content: dict[str, object]
) -> None:
    shutil.copytree(folder, tmp_path / "draft")
    (tmp_path / "draft" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="name different tokens"):
        check_draft(tmp_path / "draft", folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"text_config": 5}', '{"text_config": [1]}'])
def test_room_is_estimated_from_the_weights_where_the_configuration_says_nothing(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError):
        read_text_config(folder)
    device = Device(name="cpu", label="CPU", memory_total_bytes=2**34, memory_free_bytes=2**33)
    need = estimate_need(DeploymentSpec(name="m", path=str(folder)), num_parameters=1000, device=device)
    assert need.weights == 4000


def rewrite_header(weights: Path, change: Callable[[dict[str, Any]], None]) -> None:
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.update(shape=[1 << 40, 1 << 40]),
        lambda tensor: tensor.update(shape=[-1, 64]),
        lambda tensor: tensor.update(data_offsets=[0, 4]),
        lambda tensor: tensor.update(dtype="F128"),
        lambda tensor: tensor.update(shape="all"),
    ],
)
def test_tensors_that_are_not_as_large_as_they_say_are_refused(folder: Path, change: Any) -> None:
    rewrite_header(folder / "model.safetensors", lambda header: change(header["model.layers.1.mlp.up_proj.weight"]))
    with pytest.raises(CheckpointError, match="cut off or is no safetensors file"):
        inspect_checkpoint(folder)


def test_tensors_that_share_their_bytes_are_refused(folder: Path) -> None:
    def share(header: dict[str, Any]) -> None:
        first, second = (header[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
        second["data_offsets"] = first["data_offsets"]

    rewrite_header(folder / "model.safetensors", share)
    with pytest.raises(CheckpointError, match="cut off or is no safetensors file"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**6}, {"vocab_size": 10**9}, {"hidden_size": 10**7}])
def test_a_configuration_that_asks_for_more_than_the_weights_hold_is_refused(
    folder: Path, changes: dict[str, object]
) -> None:
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match="do not belong together"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", 7, "sub/model.safetensors"])
def test_an_index_names_only_files_beside_it(folder: Path, name: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no safetensors files beside it"):
        inspect_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["model.safetensors"]}))
    with pytest.raises(CheckpointError, match="no safetensors files beside it"):
        inspect_checkpoint(folder)


def test_a_checkpoint_may_be_of_links_to_files_elsewhere_but_not_to_devices(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert inspect_checkpoint(folder).num_layers == 3
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is no file"):
        inspect_checkpoint(folder)


def test_missing_and_broken_files_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="cut off"):
        inspect_checkpoint(folder)
    weights.write_bytes(whole[:5])
    with pytest.raises(CheckpointError, match="cut off"):
        inspect_checkpoint(folder)
    weights.write_bytes((2**60).to_bytes(8, "little") + whole[8:])
    with pytest.raises(CheckpointError, match="cut off"):
        inspect_checkpoint(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        inspect_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        inspect_checkpoint(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks the weight file model-00001-of-00002"):
        inspect_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        inspect_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        inspect_checkpoint(folder)
    with pytest.raises(CheckpointError, match="not a directory"):
        inspect_checkpoint(folder / "nowhere")


def test_a_checkpoint_without_fast_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        inspect_checkpoint(folder)
