"""Random small checkpoints of several architectures, for tests of the engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2_SIZES: dict[str, Any] = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}


def _gpt2() -> Any:
    return transformers.GPT2Config(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, **GPT2_SIZES)


def _neox() -> Any:
    sizes: dict[str, Any] = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**sizes | {"rotary_pct": 0.25})


def _gemma2() -> Any:
    return transformers.Gemma2Config(**{**SIZES, "head_dim": 20, "sliding_window": 24, "query_pre_attn_scalar": 20})


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama_long": lambda: transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 4096}),
    "llama_rope_scaled": lambda: transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "mistral_sliding": lambda: transformers.MistralConfig(**SIZES, sliding_window=24),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2_sliding": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=24),
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "gemma2": _gemma2,
    "phi": lambda: transformers.PhiConfig(**SIZES),
}  # fmt: skip


def make_checkpoint(architecture: str, path: Path, *, seed: int = 0, **changes: Any) -> Any:
    """Write a random checkpoint and return its model, in float32. `changes`: of the configuration."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[architecture]()
    config.update(changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return model


TEXT = [
    "The gate is open and the water runs.", "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "日本語のテキスト、そして絵文字 🎉🚀 in between.", "numbers 12345, punctuation; and   spaces\n\nlines\ttabs",
]  # fmt: skip
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}<|{{ message.role }}|>\n{{ message.content | trim }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(kind: str, path: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: `bytes` as GPT-2 has it, `metaspace` as Llama 2 has it."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(TEXT, trainer)
    else:
        tokenizer = _metaspace(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )
    wrapped.save_pretrained(path)


def _metaspace(special: list[str]) -> Tokenizer:
    """Pieces marked by U+2581, bytes for what is not among them; the leading space is dropped when decoding."""
    pieces = [*special, *(f"<0x{b:02X}>" for b in range(256)), *sorted({c for t in TEXT[:1] for c in t if c != " "})]
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys(pieces), "▁", "▁t", "▁th", "▁the"])}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(special)
    return tokenizer
