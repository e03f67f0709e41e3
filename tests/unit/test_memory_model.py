"""The memory estimator: exact where the configuration decides, calibrated where only measuring tells, never bold."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.sizing.memory_model import BatchShape, MemoryModel, ModelConfigError, ModelShape

LLAMA_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
GIB = 2**30


def llama() -> ModelShape:
    return ModelShape.from_config(LLAMA_8B, num_parameters=8_030_261_248)


def test_grouped_query_heads_share_their_keys_and_values() -> None:
    assert llama().kv_bytes_per_token == 128 * 1024
    plain = ModelShape.from_config({**LLAMA_8B, "num_key_value_heads": None}, num_parameters=8_030_261_248)
    assert plain.kv_bytes_per_token == 4 * 128 * 1024


def test_gpt2_names_and_multi_query_are_understood() -> None:
    config = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
    shape = ModelShape.from_config(config, num_parameters=124_000_000, dtype="float32")
    assert shape.kv_bytes_per_token == 2 * 12 * 768 * 4
    assert shape.intermediate_size == 4 * 768
    single = ModelShape.from_config({**config, "multi_query": True}, num_parameters=124_000_000, dtype="float32")
    assert single.kv_bytes_per_token == 2 * 12 * 64 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "no vocab_size"),
        ({"hidden_size": "big"}, "hidden_size='big'"),
        ({"num_key_value_heads": 5}, "cannot share 5"),
    ],
)
def test_an_unusable_configuration_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        ModelShape.from_config({**LLAMA_8B, **change}, num_parameters=1)


def test_an_8b_model_on_a_24_gib_device_holds_a_plausible_batch() -> None:
    batch = MemoryModel(llama()).largest_batch(24 * GIB, tokens_per_sequence=2048)
    assert 20 <= batch <= 32
    assert MemoryModel(llama()).largest_batch(12 * GIB, tokens_per_sequence=2048) == 0


def test_the_rest_of_each_sequence_s_last_block_counts() -> None:
    whole, part = (
        MemoryModel(llama()).estimate(BatchShape(batch_size=10, tokens_per_sequence=tokens)) for tokens in (32, 17)
    )
    assert whole.total == part.total
    assert part.fragmentation - whole.fragmentation == whole.kv - part.kv == 10 * 15 * llama().kv_bytes_per_token


def test_measurements_replace_the_assumed_overhead() -> None:
    random, model = Random(1), MemoryModel(llama())
    for _ in range(200):
        batch = BatchShape(
            batch_size=random.randint(1, 64),
            tokens_per_sequence=random.randint(16, 4096),
            step_tokens=random.randint(64, 8192),
        )
        activations = llama().activation_bytes(max(batch.step_tokens, batch.batch_size), batch.batch_size)
        kv = batch.batch_size * model.blocks_for(batch.tokens_per_sequence) * model.block_bytes
        model.observe(batch, int(llama().weights_bytes + kv + 2 * GIB + 1.5 * activations))
    batch = BatchShape(batch_size=16, tokens_per_sequence=1000, step_tokens=4096)
    expected = llama().weights_bytes + 16 * 63 * model.block_bytes + 2 * GIB + 1.5 * llama().activation_bytes(4096, 16)
    assert model.estimate(batch).total == pytest.approx(expected, rel=0.002)


@settings(max_examples=100, deadline=None)
@given(
    memory_gib=st.floats(1, 640),
    tokens=st.integers(1, 100_000),
    step_tokens=st.integers(1, 16_384),
    measured=st.lists(st.tuples(st.integers(1, 64), st.integers(10 * GIB, 80 * GIB)), max_size=5),
)
def test_the_largest_batch_fits_and_the_next_one_does_not(
    memory_gib: float, tokens: int, step_tokens: int, measured: list[tuple[int, int]]
) -> None:
    model, memory = MemoryModel(llama()), int(memory_gib * GIB)
    for batch_size, num_bytes in measured:
        model.observe(BatchShape(batch_size=batch_size, tokens_per_sequence=500), num_bytes)
    largest = model.largest_batch(memory, tokens_per_sequence=tokens, step_tokens=step_tokens)
    for batch_size in (largest, largest + 1):
        if batch_size:
            batch = BatchShape(batch_size=batch_size, tokens_per_sequence=tokens, step_tokens=step_tokens)
            assert model.fits(batch, memory) == (batch_size == largest)
            assert batch_size > largest or model.estimate(batch).total <= memory


@given(batch_size=st.integers(1, 128), memory_gib=st.integers(1, 200))
def test_kv_blocks_and_all_else_together_fit(batch_size: int, memory_gib: int) -> None:
    model = MemoryModel(llama())
    blocks = model.kv_blocks(memory_gib * GIB, batch_size=batch_size)
    estimate = model.estimate(BatchShape(batch_size=batch_size, tokens_per_sequence=16))
    assert blocks == 0 or estimate.total - estimate.kv + blocks * model.block_bytes <= memory_gib * GIB


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BatchShape(batch_size=0, tokens_per_sequence=5)
    with pytest.raises(ValueError, match="margin"):
        MemoryModel(llama(), margin=1.0)
