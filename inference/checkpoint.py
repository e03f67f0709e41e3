"""What a checkpoint directory holds, read without torch, and whether it can be served."""

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100 * 2**20
"""Bound of the safetensors format itself."""
MAX_TENSORS = 200_000
"""Far above any model; a header that lists more is not read further."""
MAX_SIZE = 2**31 - 1
"""Of whatever a configuration counts."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STORED_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "C64": 8, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_TENSOR_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "max_model_len": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "vocab_size": ("vocab_size",),
    "head_dim": ("head_dim",),
}
_REQUIRED = ("hidden", "num_layers", "heads", "vocab_size")


class CheckpointError(Exception):
    """The checkpoint cannot be served; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What configuration and weight headers say."""

    architecture: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    dtype: str
    num_parameters: int
    eos_token_ids: frozenset[int]
    has_chat_template: bool

    def kv_bytes_per_token(self, dtype: str = "float32") -> int:
        """Memory that one token's keys and values take over all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]


def inspect_checkpoint(path: Path, *, needs_tokenizer: bool = True) -> CheckpointInfo:
    """Read a Hugging Face checkpoint directory. Raises CheckpointError with a sentence that says what to do."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory. Give the directory that holds config.json and the weights.")
    config = _read_json(path / "config.json", f"{path} has no config.json. Give a Hugging Face checkpoint directory.")
    architecture = _check_architecture(path, config)
    dtypes, num_tensors, num_parameters = _read_weights(path)
    if needs_tokenizer and not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json. Save the tokenizer in its fast form: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    sizes = {name: _number(path, config, name) for name in _REQUIRED}
    _check_sizes(path, sizes, num_tensors, num_parameters)
    return CheckpointInfo(
        architecture=architecture,
        kv_heads=_number(path, config, "kv_heads", sizes["heads"]),
        head_dim=_number(path, config, "head_dim", max(1, sizes["hidden"] // sizes["heads"])),
        max_model_len=_number(path, config, "max_model_len", 2048),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or dtypes),
        num_parameters=num_parameters,
        eos_token_ids=read_eos_token_ids(path),
        has_chat_template=read_chat_template(path) is not None,
        **sizes,
    )


def read_text_config(path: Path) -> dict[str, Any]:
    """The part of a checkpoint's config.json that describes its decoder. Raises CheckpointError."""
    config = _read_json(path / "config.json", f"{path} has no config.json. Give a Hugging Face checkpoint directory.")
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json of {path} has a text_config that is no JSON object. Download it again.")
    return text


def check_draft(draft: Path, target: Path) -> None:
    """Whether the checkpoint `draft` can guess tokens for `target`: both name the same tokens by the same ids.

    Raises CheckpointError with a sentence.
    """
    ours, theirs = inspect_checkpoint(draft), inspect_checkpoint(target)
    if ours.vocab_size != theirs.vocab_size:
        raise CheckpointError(
            f"The draft model {draft} has a vocabulary of {ours.vocab_size} tokens, {target} one of "
            f"{theirs.vocab_size}. Give a smaller model of the same family."
        )
    if _read_vocabulary(draft) != _read_vocabulary(target):
        raise CheckpointError(
            f"The draft model {draft} and {target} name different tokens by the same ids. Give a smaller model of the "
            "same family."
        )


def _read_vocabulary(path: Path) -> tuple[Any, dict[int, str]]:
    model = read_optional_json(path / "tokenizer.json").get("model")
    return model.get("vocab") if isinstance(model, dict) else None, _read_added_tokens(path)


def _read_added_tokens(path: Path) -> dict[int, str]:
    """Tokens that tokenizer.json adds to its model's, by their ids."""
    file = path / "tokenizer.json"
    added = read_optional_json(file).get("added_tokens") or []
    try:
        tokens = {token["id"]: token["content"] for token in added}
    except (KeyError, TypeError):
        tokens = {None: ""}
    if not all(type(number) is int and isinstance(text, str) for number, text in tokens.items()):
        raise CheckpointError(f"{file} has added_tokens without id and content. Download it again.")
    return tokens


def read_eos_token_ids(path: Path) -> frozenset[int]:
    """Ids that end an answer: those of generation_config.json (or config.json), and the tokenizer's own end token."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids = read_optional_json(path / name).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(number) is int for number in ids):
                raise CheckpointError(f"{path / name} has an eos_token_id that is no number or list of them. Mend it.")
            found.update(number for number in ids if number >= 0)
            break
    eos = token_text(read_optional_json(path / "tokenizer_config.json").get("eos_token"))
    if eos is not None:
        found.update(number for number, text in _read_added_tokens(path).items() if text == eos)
    return frozenset(found)


def read_chat_template(path: Path) -> str | None:
    """The default chat template, from its own file or from tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = read_optional_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1] if named else None
    return template if isinstance(template, str) else None


def token_text(value: Any) -> str | None:
    """Text of a special token as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _check_architecture(path: Path, config: dict[str, Any]) -> str:
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "no architecture"
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path} brings its own model code (auto_map in config.json), which is never run. If transformers knows "
            f"{config.get('model_type', 'its type')} itself, remove auto_map; if not, use another model."
        )
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"{architecture} is an encoder-decoder model. Only decoder-only models can be served.")
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise CheckpointError(
            f"{path} holds {architecture}, which does not generate text. Give a decoder-only model (…ForCausalLM)."
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{path} holds quantized weights. Give the checkpoint in float32, bfloat16 or float16.")
    return architecture


def _check_sizes(path: Path, sizes: dict[str, int], num_tensors: int, num_parameters: int) -> None:
    """A configuration that asks for more than the weights hold would be given memory, and random numbers in it."""
    if sizes["num_layers"] > num_tensors or sizes["vocab_size"] * sizes["hidden"] > num_parameters:
        asked = f"{sizes['num_layers']} layers and a vocabulary of {sizes['vocab_size']} by {sizes['hidden']}"
        raise CheckpointError(
            f"config.json of {path} describes {asked}, and its weights are {num_tensors} tensors with {num_parameters} "
            "numbers. They do not belong together; download the checkpoint again."
        )


def _read_weights(path: Path) -> tuple[str, int, int]:
    """The commonest dtype, the number of tensors and of parameters, from the headers of all weight files."""
    counts: Counter[str] = Counter()
    num_tensors = 0
    for file in _weight_files(path):
        for tensor in _read_header(file).values():
            counts[tensor["dtype"]] += math.prod(tensor["shape"])
            num_tensors += 1
    commonest = counts.most_common(1)[0][0] if counts else "F32"
    return _TENSOR_DTYPES.get(commonest, "float32"), num_tensors, sum(counts.values())


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    names = _indexed_names(index) if index.is_file() else [file.name for file in sorted(path.glob("*.safetensors"))]
    files = [path / name for name in names]
    missing = [f.name for f in files if not f.is_file()]
    if missing and not index.is_file():
        raise CheckpointError(f"{path / missing[0]} is no file. Give a complete checkpoint directory.")
    if missing:
        raise CheckpointError(f"{path} lacks the weight file {missing[0]} that its index names. Download it again.")
    if files:
        return files
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise CheckpointError(
            f"{path} has only pickled weights, which can run code and are never loaded. Convert them: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
        )
    raise CheckpointError(f"{path} has no *.safetensors weights. Give a complete checkpoint directory.")


def _indexed_names(index: Path) -> list[str]:
    """Weight files that an index names, all of them beside it."""
    weights = _read_json(index, "").get("weight_map")
    names = set(weights.values()) if isinstance(weights, dict) and len(weights) <= MAX_TENSORS else {None}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names weights that are no safetensors files beside it. Download it again.")
    return sorted(str(name) for name in names)


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor names with dtype, shape and offsets (safetensors format: 8 bytes of length, JSON, data)."""
    broken = CheckpointError(f"{file} is cut off or is no safetensors file. Download it again.")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            text = stream.read(length) if 2 <= length <= min(MAX_HEADER_BYTES, size - 8) else b""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}). Let this user read it.") from error
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        header.pop("__metadata__", None)
        end = _check_layout(header)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise broken from error
    if 8 + length + end != size:
        raise broken
    return header


def _check_layout(header: dict[str, dict[str, Any]]) -> int:
    """Bytes of all tensors. Raises ValueError where they overlap, leave gaps, or do not have their shape's size."""
    if len(header) > MAX_TENSORS:
        raise ValueError(f"{len(header)} tensors")
    end = 0
    for tensor in sorted(header.values(), key=lambda tensor: tuple(map(int, tensor["data_offsets"]))):
        start, stop = tensor["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in tensor["shape"]):
            raise ValueError("a shape is no shape")
        if start != end or stop - start != math.prod(tensor["shape"]) * _STORED_BYTES[tensor["dtype"]]:
            raise ValueError("a tensor does not lie where it should")
        end = stop
    return end


def _number(path: Path, config: dict[str, Any], name: str, default: int | None = None) -> int:
    """What the configuration says under one of the names that architectures have for it, else `default`."""
    key = next((key for key in _ALIASES[name] if config.get(key) is not None), _ALIASES[name][0])
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise CheckpointError(f"config.json of {path} does not say {key}. Give a complete checkpoint.")
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise CheckpointError(
            f"config.json of {path} has a {key} that is no whole number from 1 to {MAX_SIZE}. Download it again."
        )
    return value


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(missing)
    try:
        content = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no JSON object. Download it again.")
    return content


def read_optional_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises CheckpointError where it is none."""
    return _read_json(file, "") if file.is_file() else {}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}). Download it again, or let this user read it."
        ) from error
