"""A request while it runs: its tokens, its KV blocks, and its part in one engine step."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    """Always set at admission (random when the client gave none): a token depends only on seed and position,
    so that a resumed request goes on with the same text."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(slots=True, kw_only=True)
class Sequence:
    """Mutable state of a running request. `tokens` is prompt followed by output."""

    id: str
    attempt: int
    tenant: str
    priority: int
    arrival_s: float
    tokens: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values stand in the cache."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StepPart:
    """`num_tokens` of a sequence, from `sequence.num_computed` on, that the next forward pass computes.

    `samples` is true when the part ends at the sequence's last token, so that its logits give the next one.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a step gave one part: the sampled token (None when the part does not sample), or why it failed."""

    token_id: int | None = None
    error: str | None = None
