"""How much device memory a batch needs: weights, KV cache, activations, fragmentation; and which batch fits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scheduling.core.sizing.least_squares import RecursiveLeastSquares

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1}
LIVE_HIDDEN_STATES = 4
"""Residual, attention input and output, and the feed-forward's input are alive at once in a decoder layer."""


class ModelConfigError(Exception):
    """The model's configuration lacks what a memory estimate needs; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a decoder's configuration decides its memory."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_parameters: int
    weight_bytes: int = 2
    """Bytes of a weight and of an activation."""
    kv_bytes: int = 2
    """Bytes of a cached key or value."""

    def __post_init__(self) -> None:
        if min(getattr(self, name) for name in self.__dataclass_fields__) < 1:
            raise ModelConfigError("Every size in a model's shape is at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, num_parameters: int, dtype: str = "bfloat16") -> "ModelShape":
        """From a Hugging Face `config.json`. Without `num_key_value_heads` every head has its own keys and values.

        Raises ModelConfigError.
        """
        if dtype not in DTYPE_BYTES:
            raise ModelConfigError(f"There is no size for {dtype!r}; there is one for {', '.join(DTYPE_BYTES)}.")
        hidden = _size(config, "hidden_size", "n_embd", "d_model")
        heads = _size(config, "num_attention_heads", "n_head", "num_heads")
        is_multi_query = config.get("multi_query", False) is True
        return cls(
            num_layers=_size(config, "num_hidden_layers", "n_layer", "num_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=1 if is_multi_query else _size(config, "num_key_value_heads", default=heads),
            head_dim=_size(config, "head_dim", default=hidden // heads),
            intermediate_size=_size(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
            vocab_size=_size(config, "vocab_size"),
            num_parameters=num_parameters,
            weight_bytes=DTYPE_BYTES[dtype],
            kv_bytes=DTYPE_BYTES[dtype],
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers; grouped-query heads share them."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes

    @property
    def weights_bytes(self) -> int:
        return self.num_parameters * self.weight_bytes

    def activation_bytes(self, step_tokens: int, batch_size: int) -> int:
        """What a step holds at its peak: one layer's intermediate values for all its tokens, and the logits in float32.

        Attention is taken to be fused, so that no matrix of scores is stored.
        """
        attention = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        widest = max(2 * self.intermediate_size, attention)
        per_token = (LIVE_HIDDEN_STATES * self.hidden_size + widest) * self.weight_bytes
        return step_tokens * per_token + batch_size * self.vocab_size * 4


def _size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of these keys that is set."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise ModelConfigError(f"The model's configuration has {name}={value!r}; a whole number above 0 is needed.")
    if default is None:
        raise ModelConfigError(f"The model's configuration has no {' or '.join(names)}.")
    return default


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes, by what they are for."""

    weights: int
    kv: int
    """Of the tokens themselves."""
    activations: int
    fragmentation: int
    """Rest of each sequence's last KV block, what the device's allocator cannot use, and the runtime's own."""

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """A batch whose memory is asked for: so many sequences of so many tokens, prompt and output together."""

    batch_size: int
    tokens_per_sequence: int
    step_tokens: int = 2048

    def __post_init__(self) -> None:
        if min(self.batch_size, self.tokens_per_sequence, self.step_tokens) < 1:
            raise ValueError("A batch has at least one sequence of one token, computed in steps of at least one.")


class MemoryModel:
    """Estimates memory from a model's shape, and gets better by what was measured.

    Measured minus weights and KV blocks is `overhead + factor * activations`; both are fitted, neither is negative.
    What is promised to fit stays below the device's memory by the `margin`, and by how far off estimates were lately.
    """

    def __init__(
        self, shape: ModelShape, *, block_size: int = 16, overhead_bytes: int = 512 * 2**20, margin: float = 0.03
    ):
        if block_size < 1 or overhead_bytes < 0 or not 0 <= margin < 1:
            raise ValueError("A block has at least one token, an overhead is not negative, a margin lies in [0, 1).")
        self.shape = shape
        self.block_size = block_size
        self._margin = margin
        self._fit = RecursiveLeastSquares(
            (1.0, 1.0), initial=(overhead_bytes / 2**30, 1.0), forgetting=0.99, confidence=0.05
        )

    def estimate(self, batch: BatchShape) -> MemoryEstimate:
        """The memory of a batch when all its sequences have reached their full length."""
        tokens = batch.batch_size * batch.tokens_per_sequence
        blocks = batch.batch_size * self.blocks_for(batch.tokens_per_sequence)
        raw = self.shape.activation_bytes(max(batch.step_tokens, batch.batch_size), batch.batch_size)
        overhead, factor = self._fit.coefficients
        unused = (blocks * self.block_size - tokens) * self.shape.kv_bytes_per_token
        return MemoryEstimate(
            weights=self.shape.weights_bytes,
            kv=tokens * self.shape.kv_bytes_per_token,
            activations=round(factor * raw),
            fragmentation=unused + round(overhead * 2**30),
        )

    def observe(self, batch: BatchShape, measured_bytes: int) -> None:
        """Learn the peak memory that a batch really took."""
        raw = self.shape.activation_bytes(max(batch.step_tokens, batch.batch_size), batch.batch_size)
        kv = batch.batch_size * self.blocks_for(batch.tokens_per_sequence) * self.block_bytes
        rest = max(0, measured_bytes - self.shape.weights_bytes - kv)
        self._fit.observe((1.0, raw / 2**30), rest / 2**30)

    def fits(self, batch: BatchShape, memory_bytes: int) -> bool:
        """Whether a batch fits into a device with so much memory."""
        usable = memory_bytes * (1 - self._margin) - self._fit.typical_error * 2**30
        return self.estimate(batch).total <= usable

    def largest_batch(self, memory_bytes: int, *, tokens_per_sequence: int, step_tokens: int = 2048) -> int:
        """The most sequences of that length that fit; 0 where not even one does."""

        def fits(batch_size: int) -> bool:
            batch = BatchShape(batch_size=batch_size, tokens_per_sequence=tokens_per_sequence, step_tokens=step_tokens)
            return self.fits(batch, memory_bytes)

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def kv_blocks(self, memory_bytes: int, *, batch_size: int, step_tokens: int = 2048) -> int:
        """How many KV blocks are left beside weights, activations and overhead; 0 where none are."""
        batch = BatchShape(batch_size=batch_size, tokens_per_sequence=self.block_size, step_tokens=step_tokens)
        estimate = self.estimate(batch)
        usable = memory_bytes * (1 - self._margin) - self._fit.typical_error * 2**30
        return max(0, int(usable - estimate.total + estimate.kv) // self.block_bytes)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.shape.kv_bytes_per_token
