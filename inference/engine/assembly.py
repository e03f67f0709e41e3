"""From a deployment to a forward pass over a paged cache, chosen for the device and checked against the model's own."""

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from inference.checkpoint import CheckpointInfo, inspect_checkpoint
from inference.engine import graphs, llama, loading, memory, weights
from inference.engine.batch import StepBatch
from inference.engine.errors import ModelLoadError
from inference.engine.graphs import GraphedForward
from inference.engine.kv_cache import BLOCK_SIZE, CacheSize, DraftNeeds, KVCache, KVShape, size_cache, size_host_cache
from inference.engine.llama import LlamaForward
from inference.engine.modules import ModulesForward
from inference.engine.native import WeightKind, load_kernels
from inference.messages import DeploymentSpec

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_TOKENS = 24

Forward = Callable[[StepBatch], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What a runner runs. Lengths are in tokens."""

    forward: Forward
    """Logits [N, vocab] of a batch's sample rows."""
    prepare: Callable[[StepBatch], None] | None
    """Sends a decode step's tables ahead of its tokens, where that is of use."""
    extend: Callable[[int], int | None] | None
    """Makes a size of decode steps ready that batches of so many sequences lack, where there are sizes; which."""
    cache: KVCache
    device: torch.device
    dtype: torch.dtype
    """Of the activations and of the cache."""
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    description: str
    """What was chosen, and why."""


def assemble(
    spec: DeploymentSpec,
    device: str,
    *,
    num_blocks: int | None = None,
    num_host_blocks: int | None = None,
    native: bool = True,
    fused: bool = True,
) -> Assembly:
    """Load the checkpoint. Numbers of blocks are chosen from free memory where not given.

    Raises ModelLoadError or CheckpointError with a sentence that says what to do.
    """
    path, place = Path(spec.path), choose_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)  # where Triton launches and torch captures, whatever device tensors name
    info = inspect_checkpoint(path, needs_tokenizer=False)
    config = loading.load_config(path)
    kernels = load_kernels() if native and place.type == "cpu" and spec.dtype != "float16" else None
    if kernels is not None:
        kernels.set_threads(torch.get_num_threads())
    kind = _choose_kind(spec, info, kernels)
    dtype = torch.float32 if kernels is not None else _choose_dtype(spec.dtype, place)
    with memory.explaining(f"The configuration of {path} cannot be served", loading.MEND):
        max_model_len = loading.longest_sequence(config, spec.max_model_len)
        shape = loading.kv_shape(config, dtype)
        vocab_size = int(config.get_text_config().vocab_size)
    draft = _draft_needs(spec, dtype)
    weight_bytes = info.num_parameters * dtype.itemsize
    memory.check_room(
        place,
        weight_bytes=weight_bytes + (draft.weight_bytes if draft else 0),
        kv_bytes=spec.kv_memory_bytes if num_blocks is None else num_blocks * shape.block_bytes,
    )
    if place.type == "cuda" and DTYPES.get(info.dtype) != dtype:  # converted on the host, else read from the file
        memory.check_room(torch.device("cpu"), weight_bytes=weight_bytes, kv_bytes=0)
    model = loading.load_model(path, config, dtype, place)
    graph_bytes = graphs.memory_bytes(largest_batch(spec), vocab_size) if place.type == "cuda" else 0
    cache, why = _make_cache(spec, shape, place, max_model_len, num_blocks, num_host_blocks, draft, graph_bytes)
    forward, how = _build_forward(spec, model, kernels, kind, cache, max_model_len, vocab_size, fused)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    graphed = forward if isinstance(forward, GraphedForward) else None
    return Assembly(
        forward=forward, prepare=graphed.prepare if graphed else None, extend=graphed.extend if graphed else None,
        cache=cache, device=place, dtype=dtype, max_model_len=max_model_len, vocab_size=vocab_size,
        eos_token_ids=info.eos_token_ids,
        description=f"{type(model).__name__} in {str(dtype).removeprefix('torch.')} on {name}, {how}; {why}",
    )  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device of a name, or of `auto`. Raises ModelLoadError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelLoadError("There is no CUDA device here. Set PENSTOCK_DEVICE to cpu or auto.")
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ModelLoadError(f"There is no device {name}; this host has {torch.cuda.device_count()}.")
    return device


def largest_batch(spec: DeploymentSpec) -> int:
    """For how many sequences decode steps are captured: where a strategy sets the batch size, as many as any may be."""
    return spec.max_batch_size if spec.sizing == "fixed" else graphs.SIZES[-1]


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def _choose_kind(spec: DeploymentSpec, info: CheckpointInfo, kernels: ctypes.CDLL | None) -> WeightKind:
    if kernels is not None:
        return weights.choose_kind(kernels, spec.dtype, spec.quantization, info.dtype)
    return "int8" if spec.quantization == "int8" else "float32"


def _make_cache(
    spec: DeploymentSpec,
    shape: KVShape,
    device: torch.device,
    max_model_len: int,
    num_blocks: int | None,
    num_host_blocks: int | None,
    draft: DraftNeeds | None,
    graph_bytes: int,
) -> tuple[KVCache, str]:
    why = "as asked for"
    if num_blocks is None:
        size = size_cache(
            shape,
            device,
            max_batch_size=spec.max_batch_size,
            max_model_len=max_model_len,
            requested_bytes=spec.kv_memory_bytes,
            draft=draft,
            graph_bytes=graph_bytes,
        )
        num_blocks, why = size.num_blocks, size.reason
    mib = num_blocks * shape.block_bytes / 2**20
    with memory.explaining(f"There is no place for a KV cache of {mib:.0f} MiB"):
        cache = KVCache(shape, num_blocks, device)
    host = size_host_cache(shape, num_blocks)
    if num_host_blocks is not None:
        host = CacheSize(num_host_blocks, "as asked for")
    cache.set_host_blocks(host.num_blocks)
    said = f"KV cache of {num_blocks} blocks of {BLOCK_SIZE} tokens, {mib:.0f} MiB: {why}"
    return cache, f"{said}; {cache.num_host_blocks} blocks of host memory for swapping: {host.reason}"


def _draft_needs(spec: DeploymentSpec, dtype: torch.dtype) -> DraftNeeds | None:
    if spec.speculation != "model":
        return None
    path = Path(spec.draft_path)
    num_parameters = inspect_checkpoint(path, needs_tokenizer=False).num_parameters
    config = loading.load_config(path)
    with memory.explaining(f"The configuration of {path} cannot be served", loading.MEND):
        return DraftNeeds(loading.kv_shape(config, dtype).block_bytes, num_parameters * dtype.itemsize)


def _build_forward(
    spec: DeploymentSpec,
    model: PreTrainedModel,
    kernels: ctypes.CDLL | None,
    kind: WeightKind,
    cache: KVCache,
    max_model_len: int,
    vocab_size: int,
    fused: bool,
) -> tuple[Forward, str]:
    """Choose the forward pass, and hold it against the model's own before anything is served; and its description."""
    tokens = min(PROBE_TOKENS, max_model_len, cache.num_blocks * BLOCK_SIZE)
    forward: Forward
    try:
        exact = expected = loading.reference_logits(model, vocab_size, tokens, model.device)
        if kind != "float32":
            weights.round_weights(model, kind)
            expected = loading.reference_logits(model, vocab_size, tokens, model.device)
        with torch.inference_mode():
            if cache.device.type == "cuda":
                forward, how = _cuda_forward(spec, model, kind, cache, max_model_len, expected)
            elif kernels is not None and fused and llama.supports(model):
                forward, how = LlamaForward(kernels, model, cache, max_model_len, kind), "fused and compiled"
            else:
                forward, how = ModulesForward(kernels, model, cache, model.device, kind), "transformers' modules"
                how += " with compiled attention and linear layers" if kernels is not None else ""
        tolerance = loading.PROBE_TOLERANCE[torch.bfloat16 if kind == "amx" else cache.shape.dtype]
        found = loading.verify(forward, expected, tolerance)
    except Exception as error:
        why = str(error) if isinstance(error, ModelLoadError) else memory.describe(error)
        raise ModelLoadError(f"{type(model).__name__} cannot be served by this engine: {why}") from error
    if kind != "float32":
        off = float((found - exact).square().mean().sqrt() / exact.std().clamp_min(1e-6))
        how += f", {weights.SAID[kind]} (logits off by {off:.1%} of their spread)"
    return forward, how


def _cuda_forward(
    spec: DeploymentSpec,
    model: PreTrainedModel,
    kind: WeightKind,
    cache: KVCache,
    max_model_len: int,
    expected: torch.Tensor,
) -> tuple[Forward, str]:
    """Decode steps by a Triton kernel, as CUDA graphs in the sizes in which that works here; else in plain torch."""
    how, tolerance = "transformers' modules", loading.PROBE_TOLERANCE[cache.shape.dtype]
    try:
        from inference.engine.paged_triton import attend_decodes

        modules = ModulesForward(None, model, cache, cache.device, kind, attend_decodes)
        loading.verify(modules, expected, tolerance)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        logger.warning("Decode steps cannot use a Triton kernel here", exc_info=True)
        return ModulesForward(None, model, cache, cache.device, kind), f"{how} in plain torch"
    check = checker(cache, expected, tolerance)
    graphed = GraphedForward(modules, model, cache, attend_decodes, max_model_len, check=check)
    graphed.capture(largest_batch(spec))
    if not graphed.sizes:
        return graphed, f"{how}, decode steps by a Triton kernel, without graphs"
    return graphed, f"{how}, decode steps of up to {graphed.sizes[-1]} sequences as CUDA graphs over a Triton kernel"


def checker(cache: KVCache, expected: torch.Tensor, tolerance: loading.Tolerance) -> Callable[[Forward], None]:
    """Holds a forward pass against the model's own logits; the cache is then as it was. See `loading.verify`."""

    def check(forward: Forward) -> None:
        with cache.kept(-(-len(expected) // BLOCK_SIZE)):
            loading.verify(forward, expected, tolerance)

    return check
