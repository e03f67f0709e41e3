"""What this engine's steps and swaps cost, learned while they run, and what follows for preempted sequences."""

from scheduling.core.sizing.cost_model import (
    NO_STEPS,
    StepCost,
    StepFeatures,
    StepTimeModel,
    SwapLink,
    cheaper_preemption,
)

MIN_OBSERVATIONS = 16
"""Before anything is concluded from what steps took."""
DECODES_AT_ONCE = 8


class StepCosts:
    """The loop notes every step; sizing and preemption ask."""

    def __init__(self, *, block_bytes: int = 0, block_size: int = 1, swap_bytes_per_s: float = 0.0) -> None:
        """`swap_bytes_per_s`: between the KV cache and host memory, as measured; 0 where there is no way."""
        self._model = StepTimeModel()
        self._decodes, self._decodes_s = NO_STEPS, 0.0
        self._link = SwapLink(bytes_per_s=swap_bytes_per_s) if swap_bytes_per_s > 0 else None
        self._kv_bytes_per_token = block_bytes // block_size

    def note(self, features: StepFeatures, seconds: float) -> None:
        """A step of these features took so long. Steps that only decode are learned several at a time, to save time."""
        if features.prefill_tokens:
            self._model.observe(features, seconds)
            return
        self._decodes, self._decodes_s = self._decodes.plus(features), self._decodes_s + seconds
        if self._decodes.steps >= DECODES_AT_ONCE:
            self._model.observe(self._decodes, self._decodes_s)
            self._decodes, self._decodes_s = NO_STEPS, 0.0

    @property
    def cost(self) -> StepCost | None:
        """The cost as learned so far; None while too few steps ran, or all were so alike that they tell no price."""
        if self._model.num_observations < MIN_OBSERVATIONS:
            return None
        try:
            return self._model.mean_cost
        except ValueError:  # one growing sequence alone: all of the time is put down to its context
            return None

    def swap_pays(self, num_tokens: int) -> bool:
        """Whether moving so many tokens out and back is cheaper than computing them again."""
        cost = self.cost
        if cost is None:
            return False
        choice = cheaper_preemption(
            cost, self._link, num_tokens=num_tokens, kv_bytes_per_token=self._kv_bytes_per_token
        )
        return choice == "swap"
