"""From a checkpoint directory to a model whose attention is ours, checked against the model's own attention."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inference.engine.batch import StepBatch, build_batch
from inference.engine.errors import ModelLoadError
from inference.engine.kv_cache import BLOCK_SIZE, KVShape
from inference.engine.memory import explaining
from scheduling.core.sequence import SamplingParams, Sequence, StepPart

logger = logging.getLogger(__name__)

PROGRESS_S = 2.0
MEND = "Download it again, or mend its config.json."


class Tolerance(NamedTuple):
    """How far logits may be off, as fractions of their spread."""

    token: float
    """All logits of one token: the root of their mean square."""
    logit: float
    """A single one."""


PROBE_TOLERANCE = {
    torch.float32: Tolerance(1e-3, 1e-3),
    torch.bfloat16: Tolerance(0.2, 1.0),
    torch.float16: Tolerance(0.05, 0.25),
}
"""Half precision rounds after every layer: random Llamas of 16 to 48 layers in bfloat16 are off by 0.02 to 0.16 for a
token, and by 0.1 to 0.7 for the worst of 384,000 logits; a position that is wrong by one alone makes that 0.27 and 1.0,
and what is really wrong (a mask, a layer's cache) far more. Float16 rounds an eighth as coarsely."""


def load_config(path: Path) -> Any:
    """Read the checkpoint's configuration; never runs code of the checkpoint's own."""
    with explaining(f"The configuration of {path} cannot be read", MEND):
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)


def load_model(path: Path, config: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load safetensors weights into transformers' modules, in evaluation mode; the log tells how far it is.

    Raises ModelLoadError.
    """
    transformers.logging.disable_progress_bar()
    loaded: Any
    former = transformers.logging.set_tqdm_hook(partial(_tell_progress, path.name))
    cannot = f"The checkpoint {path} cannot be loaded"
    try:
        with explaining(cannot, MEND), _naming_other_shapes():
            loaded = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    finally:
        transformers.logging.set_tqdm_hook(former)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ModelLoadError(
            f"The checkpoint {path} lacks {len(missing)} weights, {missing[0]} first. Download it again."
        )
    with explaining(cannot):
        return model.eval().requires_grad_(False).to(device)  # type: ignore[no-any-return]


@contextmanager
def _naming_other_shapes() -> Iterator[None]:
    """In place of transformers' advice, which is to a programmer."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ValueError("its weights have other shapes than its configuration asks for") from error
        raise


def _tell_progress(name: str, bar: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """In place of a progress bar: an iterator that logs every other second."""
    items = arguments[0] if arguments else options.get("iterable")
    if items is None or not hasattr(items, "__len__"):
        return bar(*arguments, **options)
    return _logged(name, items)


def _logged(name: str, items: Any) -> Iterator[Any]:
    told_s = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - told_s >= PROGRESS_S:
            told_s = time.monotonic()
            logger.info("Loading %s: %.0f %% of %d tensors", name, 100 * number / len(items), len(items))
        yield item
    logger.info("Loaded %s: %d tensors", name, len(items))


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
def reference_logits(model: PreTrainedModel, vocab_size: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Logits [num_tokens, vocab] by the model's own attention, to hold ours against."""
    model.set_attn_implementation("eager")
    tokens = torch.tensor([_probe_tokens(vocab_size, num_tokens)], device=device)
    logits: torch.Tensor = model(tokens, use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def verify(forward: Callable[[StepBatch], torch.Tensor], expected: torch.Tensor, tolerance: Tolerance) -> torch.Tensor:
    """Run the probe in three chunks over the paged cache and compare; the logits. Uses the cache's first blocks.

    Raises ModelLoadError where the logits differ: the architecture then does something (recurrent state, an attention
    mask of its own) that this engine does not serve.
    """
    num_tokens, vocab_size = expected.shape
    tokens = _probe_tokens(vocab_size, num_tokens)
    sequence = Sequence(
        id="probe", attempt=0, tenant="", priority=0, arrival_s=0.0, tokens=tokens, num_prompt_tokens=num_tokens,
        max_tokens=0, sampling=SamplingParams(), block_table=list(range(-(-num_tokens // BLOCK_SIZE)))[::-1],
    )  # fmt: skip
    found = []
    for count in (num_tokens // 3, num_tokens - num_tokens // 3 - 1, 1):
        batch = build_batch([StepPart(sequence, count, samples=False)], BLOCK_SIZE)
        batch.sample_rows = np.arange(count)
        found.append(forward(batch))
        sequence.num_computed += count
    logits = torch.cat(found)
    off = (logits - expected) / expected.std().clamp_min(1e-6)
    token, logit = float(off.square().mean(1).sqrt().max()), float(off.abs().max())
    if not (token <= tolerance.token and logit <= tolerance.logit):
        raise ModelLoadError(
            f"Its logits over paged KV differ from its own by {token:.2g} of their spread ({logit:.2g} at most)."
        )
    return logits


def _probe_tokens(vocab_size: int, num_tokens: int) -> list[int]:
    return [(i * 7919 + 11) % vocab_size for i in range(num_tokens)]
