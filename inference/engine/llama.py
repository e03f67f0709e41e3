"""The forward pass of the Llama family (Llama, Mistral, Qwen2, Qwen3) as one call of the compiled kernels."""

import ctypes
from typing import Any

import torch
from transformers import PreTrainedModel

from inference.engine.batch import StepBatch
from inference.engine.kv_cache import KVCache
from inference.engine.native import BoundBatch, Heads, Layer, Model, PackedLinear, Space, WeightKind

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def supports(model: PreTrainedModel) -> bool:
    """Whether this forward pass computes what the model's modules compute."""
    config = model.config
    return config.model_type in MODEL_TYPES and config.hidden_act == "silu" and hasattr(model.model, "rotary_emb")


class LlamaForward:
    """Weights packed and fused (q, k, v; gate, up), attention over the paged cache, no Python between layers."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        model: PreTrainedModel,
        cache: KVCache,
        max_model_len: int,
        kind: WeightKind = "float32",
    ) -> None:
        """Takes the weights over: the model's layers are emptied as they are packed."""
        self._kernels = kernels
        self._kind = kind
        self._cache = cache
        self._kept: list[Any] = []
        layers = model.model.layers
        structs = (Layer * len(layers))()
        for i in range(len(layers)):
            self._fill(structs[i], layers[i], i)
            layers[i] = torch.nn.Identity()
        lm_head = self._pack(model.lm_head)
        cos, sin = _rotary_tables(model, max_model_len)
        embedding, norm = model.model.embed_tokens.weight, model.model.norm
        self._kept += [structs, cos, sin, embedding, norm]
        self.vocab_size, self._hidden = embedding.shape
        self._model = Model(
            len(layers), self._hidden, norm.variance_epsilon, ctypes.addressof(structs), embedding.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), norm.weight.data_ptr(), lm_head,
        )  # fmt: skip
        self._wide = max(max(layer.qkv.outputs, layer.gate_up.outputs) for layer in structs)
        self._inner = max(max(layer.output.inputs, layer.down.inputs) for layer in structs)

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        """Logits [N, vocab] of the batch's sample rows."""
        tokens, rows = len(batch.token_ids), len(batch.sample_rows)
        scratch = [torch.empty(tokens * n) for n in (self._hidden, self._hidden, self._wide, self._inner)]
        logits = torch.empty((rows, self.vocab_size))
        space = Space(*(t.data_ptr() for t in (*scratch, logits)))
        bound = BoundBatch(batch)
        self._kernels.llama_forward(ctypes.addressof(self._model), bound.address, ctypes.addressof(space))
        return logits

    def _fill(self, struct: Layer, layer: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        struct.input_norm = layer.input_layernorm.weight.data_ptr()
        struct.post_norm = layer.post_attention_layernorm.weight.data_ptr()
        self._kept += [layer.input_layernorm, layer.post_attention_layernorm]
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                self._kept.append(getattr(attention, name))
                setattr(struct, name, getattr(attention, name).weight.data_ptr())
        struct.qkv = self._pack(attention.q_proj, attention.k_proj, attention.v_proj)
        struct.output = self._pack(attention.o_proj)
        struct.gate_up = self._pack(mlp.gate_proj, mlp.up_proj)
        struct.down = self._pack(mlp.down_proj)
        struct.heads = self._heads(attention)
        struct.keys = self._cache.keys[index].data_ptr()
        struct.values = self._cache.values[index].data_ptr()

    def _heads(self, attention: Any) -> Heads:
        kv_heads = self._cache.shape.num_kv_heads
        window = getattr(attention, "sliding_window", None)
        if attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        heads = kv_heads * attention.num_key_value_groups
        return Heads(heads, kv_heads, self._cache.shape.head_dim, window or 0, attention.scaling, 0.0)

    def _pack(self, *parts: torch.nn.Linear) -> Any:
        weight = torch.cat([part.weight for part in parts])
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat([torch.zeros(len(p.weight)) if p.bias is None else p.bias for p in parts])
        packed = PackedLinear(self._kernels, weight, bias, self._kind)
        self._kept.append(packed)
        return packed.struct


def _rotary_tables(model: PreTrainedModel, max_model_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [position, head_dim], from the model's own module, so that its scaling is right."""
    positions = torch.arange(max_model_len)[None]
    cos, sin = model.model.rotary_emb(torch.empty(1, dtype=torch.float32), positions)
    return cos[0].contiguous(), sin[0].contiguous()
