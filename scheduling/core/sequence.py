"""A request while it runs: its tokens, its KV blocks, and its part in one engine step."""

from dataclasses import dataclass, field
from typing import NamedTuple


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
    top_k: int = 0
    """Likeliest tokens that are drawn from; 0 is all."""
    min_p: float = 0.0
    """Least probability of a token that is drawn, relative to the likeliest one's."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what is added to their logits."""
    min_tokens: int = 0
    """Output tokens before which nothing ends the request."""
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    """Whether the text ends with the stop string or stop token, rather than before it."""
    skip_special_tokens: bool = True
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside each chosen one; None reports nothing."""

    @property
    def penalises(self) -> bool:
        """Whether a token's logits depend on the tokens before it in another way than through the model."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


class TokenLogprob(NamedTuple):
    """Natural log probability of a chosen token and of the likeliest ones, before penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest first."""


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
    notes: object | None = None
    """What the sampler counts of `tokens` between two steps; it counts anew where this is None."""
    lookup: object | None = None
    """What speculation has indexed of `tokens`, in the same way."""

    failures: int = 0
    """Engine processes that ended, other than in good order, while they ran it."""
    is_urgent: bool = False
    """It was claimed to take the slot of a lower one, as the policy in force allows."""
    num_preemptions: int = 0
    """How often it lost its slot to a higher request."""
    num_cached: int = 0
    """Tokens that were found in the cache when it was first admitted."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Content of its full blocks from the first on, as far as anybody asked, see core/prefix.py."""
    num_published: int = 0
    """Blocks of its table that others may find in the cache."""
    host_table: list[int] = field(default_factory=list)
    """Blocks of host memory that hold its first `num_swapped` tokens while it is preempted."""
    num_swapped: int = 0

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StepPart:
    """`num_tokens` of a sequence, from `sequence.num_computed` on, that the next forward pass computes.

    `samples` is true when the part ends at the sequence's last token, so that its logits give the next one. A decode
    may go on after that with `draft`: tokens guessed to come next, among the `num_tokens`, to be verified by the pass.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PartResult:
    """What a step gave one part: the sampled token (None when the part does not sample), or why it failed."""

    token_id: int | None = None
    error: str | None = None
    more: tuple[int, ...] = ()
    """Tokens after that one, where a draft was right so far: as many as were right."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each of these tokens, where asked for."""
