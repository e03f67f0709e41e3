"""How long an engine step takes: a linear model of what it computes, learned from the steps that ran."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from operator import add
from pathlib import Path
from typing import Literal, NamedTuple

from scheduling.core.sequence import StepPart
from scheduling.core.sizing.least_squares import RecursiveLeastSquares

FORMAT = "penstock-step-cost-1"


class CostFileError(Exception):
    """The file does not hold a step cost; the message says what is wrong with it."""


class StepFeatures(NamedTuple):
    """What a step computes; the sum over several steps describes all of them together."""

    steps: int
    prefill_tokens: int
    decode_sequences: int
    context_tokens: int
    """Tokens whose keys and values the decodes read."""
    attention_pairs: int
    """Pairs of a prefill token and a token it attends to: quadratic in the length of a prompt."""

    def plus(self, other: "StepFeatures") -> "StepFeatures":
        """Both together."""
        return StepFeatures(*map(add, self, other))


NO_STEPS = StepFeatures(0, 0, 0, 0, 0)

SCALES = StepFeatures(1, 500, 20, 20_000, 500_000)
"""Typical magnitudes in one step."""


def measure_parts(parts: Iterable[StepPart]) -> StepFeatures:
    """The features of a step, from its parts as they are planned (before `apply`)."""
    prefill_tokens = decode_sequences = context_tokens = attention_pairs = 0
    for part in parts:
        start, num_tokens = part.sequence.num_computed, part.num_tokens
        if num_tokens == 1 and part.samples and start:
            decode_sequences += 1
            context_tokens += start + 1
        else:
            prefill_tokens += num_tokens
            attention_pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return StepFeatures(1, prefill_tokens, decode_sequences, context_tokens, attention_pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step: a fixed part, and so much for each of what it computes."""

    step_s: float
    prefill_token_s: float
    decode_sequence_s: float
    context_token_s: float
    attention_pair_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be a number of seconds, 0 or more, not {value!r}.")
        if self.step_s + self.prefill_token_s <= 0 or self.step_s + self.decode_sequence_s <= 0:
            raise ValueError("A step that takes no time is not a model of an engine.")

    def predict(self, parts: Iterable[StepPart]) -> float:
        """Seconds that a step of these parts takes."""
        return self.price(measure_parts(parts))

    def price(self, features: StepFeatures) -> float:
        """Seconds for what was measured of a step, or of several together."""
        # The decodes' context comes last: the simulator adds it step by step, and must come to the same float.
        return (
            features.steps * self.step_s
            + features.prefill_tokens * self.prefill_token_s
            + features.attention_pairs * self.attention_pair_s
            + features.decode_sequences * self.decode_sequence_s
            + features.context_tokens * self.context_token_s
        )

    def recompute_s(self, num_tokens: int) -> float:
        """Seconds of computing the keys and values of so many tokens again, within steps that run anyway."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return num_tokens * self.prefill_token_s + pairs * self.attention_pair_s

    def save(self, path: Path) -> None:
        """Write a cost file."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "StepCost":
        """Read a cost file. Raises CostFileError."""
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise CostFileError(f"The cost file {path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise CostFileError(f"The cost file {path} is not JSON: {error}.") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise CostFileError(f'The cost file {path} does not say "format": "{FORMAT}".')
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CostFileError(f"The cost file {path} is not usable: {error}") from error


DEFAULT_COST = StepCost(
    step_s=0.006, prefill_token_s=30e-6, decode_sequence_s=60e-6, context_token_s=60e-9, attention_pair_s=3e-9
)
"""About a 7B model in 16 bits on one large GPU: 14 GB of weights read a step, 14 GFLOP a token, 128 KB of KV."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapLink:
    """The way between device and host memory."""

    bytes_per_s: float
    latency_s: float = 50e-6

    def transfer_s(self, num_bytes: int) -> float:
        """Seconds to move that much in one direction."""
        return self.latency_s + num_bytes / self.bytes_per_s

    def swap_s(self, num_bytes: int) -> float:
        """Seconds to move that much out and, later, back in."""
        return 2 * self.transfer_s(num_bytes)


def cheaper_preemption(
    cost: StepCost, link: SwapLink | None, *, num_tokens: int, kv_bytes_per_token: int
) -> Literal["recompute", "swap"]:
    """How a sequence of so many computed tokens gives up its blocks at the least cost, out and back in together."""
    if link is None or num_tokens == 0:
        return "recompute"
    return "swap" if link.swap_s(num_tokens * kv_bytes_per_token) < cost.recompute_s(num_tokens) else "recompute"


MIN_STEP_S = 1e-6
"""No step is quicker."""


class StepTimeModel:
    """The step cost of a running engine, from the steps it takes: recursive least squares, never negative, robust.

    Errors count in proportion to a step's time: what disturbs a step grows with it, and the many short steps that only
    decode would else be told by what is left of the few long ones.
    """

    def __init__(self, initial: StepCost | None = None, *, forgetting: float = 0.999, confidence: float = 1e-6) -> None:
        """`initial` holds until measured otherwise; with a higher `confidence` for longer."""
        start, typical_s = None, 1.0
        if initial is not None:
            typical_s = initial.price(SCALES)
            start = (
                initial.step_s,
                initial.prefill_token_s,
                initial.decode_sequence_s,
                initial.context_token_s,
                initial.attention_pair_s,
            )
        self._fit = RecursiveLeastSquares(
            SCALES, initial=start, forgetting=forgetting, confidence=confidence / typical_s**2
        )
        self._keep = forgetting
        self._taken_s = self._expected_s = self._error_s = 0.0

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Learn from steps that took `seconds` together. Raises ValueError for a time that is none."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"A step takes a finite number of seconds, not {seconds!r}.")
        if features.steps < 1:
            return
        # The mean step stands for them, or a summary of a second would outweigh a hundred single steps.
        mean, mean_s = [value / features.steps for value in features], seconds / features.steps
        foreseen_s = self._fit.predict(mean)
        # What was foreseen is no measure while little is learned.
        unit_s = max(foreseen_s, mean_s / 4, MIN_STEP_S)
        self._fit.observe([value / unit_s for value in mean], mean_s / unit_s)
        self._error_s += max(0.02, 1 / self.num_observations) * (abs(mean_s - foreseen_s) - self._error_s)
        self._taken_s = self._keep * self._taken_s + seconds
        self._expected_s = self._keep * self._expected_s + features.steps * self._fit.predict(mean)

    @property
    def num_observations(self) -> int:
        return self._fit.num_observations

    @property
    def typical_error_s(self) -> float:
        """Mean absolute error of the latest predictions, each made before its step was known."""
        return self._error_s

    @property
    def cost(self) -> StepCost:
        """The cost as learned so far. Raises ValueError while nothing was observed and no initial cost was given."""
        step, prefill, decode, context, pair = self._fit.coefficients
        return StepCost(
            step_s=step,
            prefill_token_s=prefill,
            decode_sequence_s=decode,
            context_token_s=context,
            attention_pair_s=pair,
        )

    @property
    def mean_cost(self) -> StepCost:
        """The cost with its share of all hiccups, so that it adds up to the time that steps really took.

        `cost` says how long the next step will probably take; this one how long many steps take together.
        """
        cost = self.cost
        if self._expected_s <= 0:
            return cost
        factor = self._taken_s / self._expected_s
        return StepCost(**{field.name: factor * getattr(cost, field.name) for field in fields(cost)})

    def predict(self, parts: Iterable[StepPart]) -> float:
        """Seconds that a step of these parts will take."""
        return self._fit.predict(measure_parts(parts))
