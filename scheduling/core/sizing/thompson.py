"""Sizing by trial: discounted Thompson sampling over batch sizes, rewarded by goodput."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from scheduling.core.sizing.controller import Controller, Observation, memory_limit
from scheduling.core.sizing.cost_model import StepCost, StepFeatures

LATE_VALUE = 0.1
"""What any token is worth against one within the SLA: where all are late, the size that works off most is learned."""
REACH = 2
"""Sizes on either side of the best one known that are tried."""
ROAM = 0.1
"""How often all sizes are drawn from."""
PATIENCE = 8
"""A batch may take so many times the dwell to reach the size that was chosen, before it is judged all the same."""
FILLED = 0.9
MIN_SECONDS = 1e-6
"""A shorter period has no rate."""


@dataclass(slots=True)
class _Arm:
    """What is known of one batch size: discounted number, sum and sum of squares of its rewards."""

    size: int
    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    promise: float = 1.0
    """What it should earn against the mean, before it was tried."""

    def fade(self, discount: float) -> None:
        self.weight *= discount
        self.total *= discount
        self.squares *= discount

    def add(self, reward: float) -> None:
        self.weight += 1
        self.total += reward
        self.squares += reward * reward


class Adaptive(Controller):
    """Discounted Thompson sampling over sizes (Raj and Kalyani, 2017), with goodput as the reward.

    Goodput rises with the size up to a point and then falls, so mostly sizes near the best known are drawn (unimodal
    bandits: Combes and Proutiere, ICML 2014): trying far ones costs a queue each time. Old periods count less and
    less, so that a change is followed. Only periods in which the size mattered teach anything: those in which work was
    waiting for a slot, or the SLA was missed.
    """

    name = "adaptive"

    def __init__(self, params: Mapping[str, float], random: Random) -> None:
        super().__init__(params, random)
        self._arms = [_Arm(size) for size in _candidate_sizes(self._smallest, self._largest)]
        self._arm = min(self._arms, key=lambda arm: abs(math.log(arm.size / self._size)))
        self._periods_left = int(params["dwell"])
        self._patience = PATIENCE * self._periods_left
        """Periods that the batch may take to reach its size."""
        self._reward = 0.0
        self._seconds = 0.0
        self._mattered = False

    def propose(self, observation: Observation) -> tuple[int, str]:
        if self._arm.size <= memory_limit(observation) and self._patience > 0 and not self._has_come_true(observation):
            self._patience -= 1
            return self._arm.size, self._reason
        self._reward += observation.good_tokens + LATE_VALUE * observation.tokens
        self._seconds += observation.seconds
        ratio = observation.latency_ratio
        self._mattered |= self.is_full(observation) or (ratio is not None and ratio > 1)
        self._periods_left -= 1
        limit = memory_limit(observation)
        if self._periods_left > 0 and self._arm.size <= limit:
            return self._arm.size, self._reason
        self._learn()
        self._foresee(observation)
        return self._choose(limit)

    def _has_come_true(self, observation: Observation) -> bool:
        """Whether the batch has the size that was chosen, or nobody waits who could fill it.

        What runs beyond a smaller size goes on, and makes tokens that are not that size's; a larger one is filled by
        prompts first, and makes few.
        """
        if observation.num_running > self._arm.size:
            return False
        return not observation.num_waiting or observation.num_running >= FILLED * self._arm.size

    def _learn(self) -> None:
        if self._mattered and self._seconds > MIN_SECONDS:
            for arm in self._arms:
                arm.fade(self.params["discount"])
            self._arm.add(self._reward / self._seconds)
        self._periods_left = int(self.params["dwell"])
        self._patience = PATIENCE * self._periods_left
        self._reward, self._seconds, self._mattered = 0.0, 0.0, False

    def _choose(self, limit: int) -> tuple[int, str]:
        allowed = [arm for arm in self._arms if arm.size <= limit]
        if not allowed:
            self._arm = self._arms[0]
            return limit, f"memory allows {limit}"
        mean, spread = self._mean_and_spread()
        if self.random.random() >= ROAM:
            leader = max(allowed, key=lambda arm: (self._expected(arm, mean), arm.size == self._arm.size))
            around = allowed.index(leader)
            allowed = allowed[max(0, around - REACH) : around + REACH + 1]
        draws = [(self._draw(arm, mean, spread), -index, arm) for index, arm in enumerate(allowed)]
        drawn, _, self._arm = max(draws)
        known = self._arm.total / self._arm.weight if self._arm.weight else 0.0
        return self._arm.size, f"drew {drawn:.0f} tokens a second of goodput, {known:.0f} seen lately"

    def _draw(self, arm: _Arm, mean: float, spread: float) -> float:
        """A reward that this size may have; one not tried lately is taken for an average one, with doubt."""
        return self.random.gauss(self._expected(arm, mean), spread / math.sqrt(arm.weight + self.params["prior"]))

    def _expected(self, arm: _Arm, mean: float) -> float:
        prior = self.params["prior"]
        return (arm.total + prior * mean * arm.promise) / (arm.weight + prior)

    def _foresee(self, observation: Observation) -> None:
        """What the step cost promises of each size: its tokens a second against those of the sizes tried lately."""
        cost, weight = observation.cost, sum(arm.weight for arm in self._arms)
        if cost is None or weight <= 0:
            return
        rates = [decode_rate(cost, arm.size, observation.mean_context_tokens) for arm in self._arms]
        usual = sum(arm.weight * rate for arm, rate in zip(self._arms, rates, strict=True)) / weight
        for arm, rate in zip(self._arms, rates, strict=True):
            arm.promise = rate / usual

    def _mean_and_spread(self) -> tuple[float, float]:
        """Mean of what was rewarded lately, and the standard deviation of rewards within a size."""
        weight = sum(arm.weight for arm in self._arms)
        if weight <= 0:
            return 0.0, 1.0
        mean = sum(arm.total for arm in self._arms) / weight
        within = sum(arm.squares - arm.total**2 / arm.weight for arm in self._arms if arm.weight > 0)
        # One imaginary period whose reward is off by the mean keeps a lucky start from looking certain.
        return mean, math.sqrt((max(0.0, within) + mean * mean) / (weight + 1)) or 1.0


def decode_rate(cost: StepCost, batch_size: int, mean_context_tokens: float) -> float:
    """Tokens a second of a batch that only decodes."""
    context = round(batch_size * mean_context_tokens)
    return batch_size / cost.price(StepFeatures(1, 0, batch_size, context, 0))


def _candidate_sizes(smallest: int, largest: int) -> list[int]:
    """Sizes from smallest to largest, each about 1.4 times the one before."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, round(sizes[-1] * math.sqrt(2)))))
    return sizes
