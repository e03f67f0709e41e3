"""A model in half precision is served where its logits are its own but for rounding, and refused where they are not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from inference.engine import attention, modules
from inference.engine.batch import StepBatch
from inference.engine.errors import ModelLoadError
from inference.engine.runner import ModelRunner
from inference.messages import DeploymentSpec
from tests.checkpoints import ARCHITECTURES, make_checkpoint

DEEP: dict[str, Any] = {
    "vocab_size": 16_000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 16,
    "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.0462,
}  # fmt: skip
attend_group, attend_padded, lay_out = attention._attend_group, attention._attend_padded, attention.PagedContext


def load(path: Path, dtype: Any) -> ModelRunner:
    return ModelRunner(DeploymentSpec(name="m", path=str(path), dtype=dtype), "cpu", num_blocks=8, native=False)


def test_what_rounding_does_in_many_layers_is_no_reason_to_refuse(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**DEEP)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert "bfloat16" in load(tmp_path, "bfloat16").describe()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_served_in_bfloat16(architecture: str, tmp_path: Path) -> None:
    make_checkpoint(architecture, tmp_path)
    assert "bfloat16" in load(tmp_path, "bfloat16").describe()


def see_all(query: Any, keys: Any, values: Any, group: Any, rule: Any) -> torch.Tensor:
    return attend_group(query, keys, values, replace(group, positions=group.positions * 0 + 4096, whole=0), rule)


def swap_one_layer(paged: Any, layer: int, query: Any, key: Any, value: Any, rule: Any) -> torch.Tensor:
    return attend_padded(paged, layer, query, *((value, key) if layer == 1 else (key, value)), rule)


def read_another_layer(paged: Any, layer: int, query: Any, key: Any, value: Any, rule: Any) -> torch.Tensor:
    if layer == 1:
        paged.cache.keys[1].copy_(paged.cache.keys[0])
    return attend_padded(paged, layer, query, key, value, rule)


def scale_wrongly(paged: Any, layer: int, query: Any, key: Any, value: Any, rule: Any) -> torch.Tensor:
    return attend_padded(paged, layer, 2 * query, key, value, rule)


def reverse_blocks(batch: StepBatch, *rest: Any) -> Any:
    return lay_out(replace(batch, block_tables=np.ascontiguousarray(batch.block_tables[:, ::-1])), *rest)


WRONG: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "no causal mask": (attention, "_attend_group", see_all),
    "keys for values in a layer": (attention, "_attend_padded", swap_one_layer),
    "another layer's keys": (attention, "_attend_padded", read_another_layer),
    "another scale": (attention, "_attend_padded", scale_wrongly),
    "another order of blocks": (modules, "PagedContext", reverse_blocks),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_attention_is_refused(wrong: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("llama", tmp_path)
    monkeypatch.setattr(*WRONG[wrong])
    with pytest.raises(ModelLoadError, match="differ from its own by"):
        load(tmp_path, dtype)


SHIFTS: dict[str, Callable[[Any], Any]] = {
    "doubled": lambda at: 2 * at,
    "from zero in every chunk": lambda at: at - at[0],
    "one too far in decoding": lambda at: at + (len(at) == 1),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_wrong_positions_are_refused(
    shift: Callable[[Any], Any], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("llama", tmp_path)
    forward = modules.ModulesForward.__call__

    def forward_elsewhere(self: modules.ModulesForward, batch: StepBatch) -> torch.Tensor:
        return forward(self, replace(batch, positions=shift(batch.positions)))

    monkeypatch.setattr(modules.ModulesForward, "__call__", forward_elsewhere)
    with pytest.raises(ModelLoadError, match="differ from its own by"):
        load(tmp_path, dtype)
