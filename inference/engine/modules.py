"""The forward pass of any architecture, through transformers' modules with our attention and linear layers."""

import ctypes

import torch
from transformers import PreTrainedModel

from inference.engine import attention
from inference.engine.attention import DecodeKernel, PagedContext
from inference.engine.batch import StepBatch
from inference.engine.errors import ModelLoadError
from inference.engine.kv_cache import KVCache
from inference.engine.native import WeightKind
from inference.engine.transfer import upload
from inference.engine.weights import replace_linears


class ModulesForward:
    """Runs the model's own modules; `kernels` (on a CPU) replace their attention and linear layers."""

    def __init__(
        self,
        kernels: ctypes.CDLL | None,
        model: PreTrainedModel,
        cache: KVCache,
        device: torch.device,
        kind: WeightKind = "float32",
        decode: DecodeKernel | None = None,
    ) -> None:
        """Raises ModelLoadError where the architecture does not let its attention be replaced."""
        self._kernels = kernels
        self._model = model
        self._cache = cache
        self._device = device
        self._decode = decode
        self._checked = False
        model.set_attn_implementation(attention.NAME)
        if model.config._attn_implementation != attention.NAME:
            raise ModelLoadError("It does not let its attention be replaced.")
        replace_linears(model, kernels, kind)

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        """Logits [N, vocab] of the batch's sample rows."""
        context = PagedContext(batch, self._cache, self._device, self._kernels, self._decode)
        tokens, positions, rows = upload([batch.token_ids, batch.positions, batch.sample_rows], self._device)
        logits: torch.Tensor = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            paged=context,
        ).logits[0]
        if not self._checked and sorted(context.layers_seen) != list(range(self._cache.shape.num_layers)):
            raise ModelLoadError("It has layers that do not keep their past in attention's keys and values.")
        self._checked = True
        return logits.float()
