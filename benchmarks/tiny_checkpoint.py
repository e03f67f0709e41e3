"""A checkpoint directory of a few kilobytes: a real tokenizer and chat template, weights that nobody runs."""

import json
import struct
from pathlib import Path

import tokenizers

MAX_MODEL_LEN = 2048
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = [f" {first}{second}" for first in SYLLABLES[:20] for second in SYLLABLES[::7]]


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder` and give it back."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["".join(WORDS)] * 2, trainer)
    backend.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "<|end|>"})
    _write_json(folder / "config.json", _config(backend.get_vocab_size()))
    _write_weights(folder / "model.safetensors", backend.get_vocab_size())
    return folder


def _config(vocab_size: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _write_weights(path: Path, vocab_size: int) -> None:
    num_bytes = vocab_size * 8 * 4
    tensor = {"dtype": "F32", "shape": [vocab_size, 8], "data_offsets": [0, num_bytes]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(num_bytes))
