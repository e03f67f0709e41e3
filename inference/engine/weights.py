"""How a model's weights are kept: as the checkpoint has them, or rounded to bfloat16 or int8."""

import ctypes
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inference.engine.errors import ModelLoadError
from inference.engine.native import PackedLinear, WeightKind, quantize

LINEARS = (torch.nn.Linear, Conv1D)
SAID: dict[WeightKind, str] = {
    "float32": "",
    "bfloat16": "weights kept in bfloat16, arithmetic in float32",
    "amx": "bfloat16 factors and float32 sums by AMX",
    "int8": "weights kept in int8",
}


def choose_kind(kernels: ctypes.CDLL, dtype: str, quantization: str, checkpoint_dtype: str) -> WeightKind:
    """How our kernels keep weights.

    By default as the checkpoint has them: bfloat16 weights give the very float32 products that wider copies would.
    Where bfloat16 is asked for, inputs of layers are rounded, too, if the processor is faster that way.
    """
    if quantization == "int8":
        return "int8"
    if dtype == "bfloat16":
        return "amx" if kernels.has_tiles() else "bfloat16"
    return "bfloat16" if dtype == "auto" and checkpoint_dtype == "bfloat16" else "float32"


@torch.inference_mode()
def round_weights(model: PreTrainedModel, kind: WeightKind) -> None:
    """Give the linear layers the weights that will be kept, so that the model's own modules compute what ours will.

    An embedding whose weights are the output layer's, too, is kept as it is.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    for layer in model.modules():
        if type(layer) in LINEARS:
            rows = _rows(layer)
            if kind == "int8":
                levels, scale = quantize(rows)
                rows.copy_(levels * scale[:, None])
            else:
                rows.copy_(rows.to(torch.bfloat16))


def _rows(layer: Any) -> torch.Tensor:
    """A layer's weights as [outputs, inputs]; GPT-2 keeps them the other way round."""
    weight: torch.Tensor = layer.weight.data
    return weight.T if type(layer) is Conv1D else weight


class Int8Linear(torch.nn.Module):
    """A linear layer over int8 weights by torch, on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight` is [outputs, inputs]."""
        super().__init__()
        levels, scale = quantize(weight)
        self.out_features, self.in_features = weight.shape
        self._levels, self._scale, self._bias = levels, scale.to(weight.dtype), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        out = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self._levels, self._scale)
        out = out if self._bias is None else out + self._bias
        return out.reshape(*x.shape[:-1], self.out_features)


def replace_linears(model: PreTrainedModel, kernels: ctypes.CDLL | None, kind: WeightKind) -> None:
    """Put layers of `kind` in place of every plain linear layer, freeing its weights (a tied embedding keeps its own).

    Raises ModelLoadError where torch has no product of that kind on this device.
    """
    if kernels is None and kind == "int8":
        _check_int8(next(model.parameters()))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in LINEARS:
                continue
            bias: Any = child.bias
            if kernels is not None:
                setattr(parent, name, PackedLinear(kernels, _rows(child), bias, kind))
            elif kind == "int8":
                setattr(parent, name, Int8Linear(_rows(child), bias))


def _check_int8(like: torch.Tensor) -> None:
    """Raise ModelLoadError where torch cannot multiply by int8 weights here, or does so wrongly."""
    weight = torch.randn(64, 64, device=like.device, dtype=like.dtype)
    x = torch.randn(2, 64, device=like.device, dtype=like.dtype)
    levels, scale = quantize(weight)
    try:
        found = Int8Linear(weight, None)(x)
    except (RuntimeError, NotImplementedError) as error:
        raise ModelLoadError(f"This torch has no int8 weights on {like.device.type}. Serve it without.") from error
    expected = functional.linear(x.float(), levels.float() * scale[:, None])
    if not torch.allclose(found.float(), expected, atol=0.5, rtol=0.05):
        raise ModelLoadError(f"This torch multiplies wrongly by int8 weights on {like.device.type}. Serve it without.")
