"""From a checkpoint directory to a model whose attention is ours, checked against the model's own attention."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inference.engine import attention
from inference.engine.attention import PagedContext
from inference.engine.batch import build_batch
from inference.engine.errors import ModelLoadError
from inference.engine.kv_cache import KVCache, KVShape
from scheduling.core.sequence import SamplingParams, Sequence, StepPart

PROBE_TOKENS = 24
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference of logits allowed, as a fraction of their spread."""


def load_config(path: Path) -> Any:
    """Read the checkpoint's configuration; never runs code of the checkpoint's own."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"The configuration of {path} cannot be read: {_first_line(error)}") from error


def load_model(path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load safetensors weights into transformers' modules, in evaluation mode."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"The checkpoint {path} cannot be loaded: {_first_line(error)}") from error
    return model.eval().requires_grad_(False).to(device)  # type: ignore[no-any-return]


def kv_shape(config: Any, dtype: torch.dtype) -> KVShape:
    """Layers, heads and head size from the configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return KVShape(
        num_layers=text.num_hidden_layers,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        dtype=dtype,
    )


def longest_sequence(config: Any, requested: int) -> int:
    """Tokens a sequence may hold. Raises ModelLoadError where more is asked for than the model can place.

    Rotary embeddings whose frequencies depend on the longest sequence of a batch (dynamic, longrope) are served up to
    their original length only, where they do not.
    """
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", 0) or getattr(text, "n_positions", 0) or 2048)
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope] if "rope_type" in rope else [p for p in rope.values() if isinstance(p, dict)]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, int(parameters.get("original_max_position_embeddings") or limit))
    if requested > limit:
        raise ModelLoadError(f"max_model_len is {requested}, but this model can place {limit} tokens. Lower it.")
    return requested or limit


@torch.inference_mode()
def verify_attention(model: PreTrainedModel, config: Any, shape: KVShape, device: torch.device) -> None:
    """Switch the model to our attention, and compare it with its own on a few tokens.

    Raises ModelLoadError where every layer did not come to our attention once, or where the logits differ: the
    architecture then does something (recurrent state, sinks, an own mask) that this engine does not serve.
    """
    name = type(model).__name__
    tokens = [(i * 7919 + 11) % config.get_text_config().vocab_size for i in range(PROBE_TOKENS)]
    model.set_attn_implementation("eager")
    expected = model(torch.tensor([tokens], device=device), use_cache=False).logits[0].float()
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise ModelLoadError(f"{name} does not take a replaced attention; this engine cannot serve it.")
    cache = KVCache(shape, 8, device)
    sequence = Sequence(
        id="probe", attempt=0, tenant="", priority=0, arrival_s=0.0, tokens=tokens, num_prompt_tokens=len(tokens),
        max_tokens=0, sampling=SamplingParams(temperature=0.0), block_table=[5, 2],
    )  # fmt: skip
    found = []
    for count in (7, PROBE_TOKENS - 8, 1):
        batch = build_batch([StepPart(sequence, count, samples=False)], 16)
        context = PagedContext(batch, cache, device)
        found.append(forward(model, batch.token_ids, batch.positions, context, None)[0].float())
        if sorted(context.layers_seen) != list(range(shape.num_layers)):
            raise ModelLoadError(f"{name} has layers that do not use attention as this engine serves it.")
        sequence.num_computed += count
    worst = float((torch.cat(found) - expected).abs().max() / expected.std().clamp_min(1e-6))
    if not worst <= PROBE_TOLERANCE[shape.dtype]:
        raise ModelLoadError(
            f"{name} gives other logits with the paged KV cache (off by {worst:.2g}); it cannot be served."
        )


def forward(
    model: PreTrainedModel, token_ids: Any, positions: Any, context: PagedContext, rows: torch.Tensor | None
) -> torch.Tensor:
    """Logits [1, N, vocab] of the given rows, or of all where `rows` is None."""
    return model(  # type: ignore[no-any-return]
        input_ids=torch.from_numpy(token_ids)[None].to(context.device),
        position_ids=torch.from_numpy(positions)[None].to(context.device),
        use_cache=False,
        logits_to_keep=0 if rows is None else rows,
        paged=context,
    ).logits


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
