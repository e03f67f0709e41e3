"""What a sizing strategy sees of an engine: one observer for the engines that serve and for those of a simulation."""

from collections import deque
from collections.abc import Sequence as Items
from statistics import median
from typing import NamedTuple, Protocol

from scheduling.core.sequence import Sequence
from scheduling.core.sizing.controller import Observation, Readings
from scheduling.core.sizing.cost_model import StepCost

PERIOD_S = 0.25
"""Between two looks of a strategy."""
LATENCY_WINDOW = 256
"""Ended requests over which the p99 is taken."""
LATENCY_KEEP_S = 30.0
FIRST_TOKENS = 32
"""First tokens over which the median is taken."""
NO_BLOCKS = 2**31 - 1
"""What stands for the KV blocks of a cache that is not ours: no size is bounded by them."""


class Target(Protocol):
    """What an SLA promises, in seconds from the arrival (`tpot_s`: an output token); None where it promises nothing."""

    @property
    def ttft_s(self) -> float | None: ...
    @property
    def e2e_s(self) -> float | None: ...
    @property
    def tpot_s(self) -> float | None: ...


class Blocks(Protocol):
    """KV blocks that are counted; `num_blocks` is 0 where the cache is elsewhere."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def used(self) -> int: ...


class RunningBatch(Protocol):
    """`scheduling.core.planner.StepPlanner`, or what stands for it before a server elsewhere."""

    @property
    def sequences(self) -> Items[Sequence]:
        """Those that run, before those that wait."""
        ...

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def allocator(self) -> Blocks: ...


class Work(NamedTuple):
    """What an engine has done in its life."""

    steps: int
    step_s: float
    """Seconds of all its steps."""
    tokens: int
    """Output tokens made."""


class Served(NamedTuple):
    """A request that ended in good order; times are of one clock."""

    arrival_s: float
    claimed_s: float
    first_token_s: float | None
    ended_s: float
    num_tokens: int
    """Output tokens since the claim."""
    deadline_s: float | None = None
    """Its own, which stands before the target of its SLA."""
    is_resumed: bool = False
    """An earlier claim gave its first token."""


class SizingObserver:
    """Sums up periods of one engine.

    A strategy judges by what a smaller batch can mend: latencies count from the claim, as the worst share of what was
    promised from the arrival. Time in the queue is left out; a smaller batch, which is the answer to too high a
    latency, would lengthen it.
    """

    def __init__(self, batch: RunningBatch, work: Work, now_s: float) -> None:
        """What counts from is `work`, that of now."""
        self._batch = batch
        self._ratios: deque[tuple[float, float]] = deque(maxlen=LATENCY_WINDOW)
        self._first_s: deque[tuple[float, float]] = deque(maxlen=FIRST_TOKENS)
        self._begin_period(work, now_s)

    def count_end(self, served: Served, target: Target | None) -> None:
        """A request ended in good order: how that compares with what it was promised."""
        if max(_shares(served, served.arrival_s, target), default=0.0) <= 1.0:
            self._good_tokens += served.num_tokens
        if shares := _shares(served, served.claimed_s, target):
            self._ratios.append((served.ended_s, max(shares)))

    def count_first_token(self, now_s: float, seconds: float) -> None:
        """A request's first token came so long after its claim."""
        self._first_s.append((now_s, seconds))

    def count_refusal(self) -> None:
        """A server behind turned a request away, or did not answer it."""
        self._num_refused += 1

    def forget(self) -> None:
        """The size has changed: latencies under the earlier one say nothing of this one."""
        self._ratios.clear()
        self._first_s.clear()

    def observe(
        self,
        work: Work,
        now_s: float,
        *,
        num_queued: int,
        memory_batch_limit: int | None,
        cost: StepCost | None,
        telemetry: Readings | None,
    ) -> Observation:
        """The period that ends now; the next one begins. `num_queued`: requests in the fleet queue."""
        batch, before = self._batch, self._before
        for kept in (self._ratios, self._first_s):
            while kept and now_s - kept[0][0] > LATENCY_KEEP_S:
                kept.popleft()
        ratios = sorted(ratio for _, ratio in self._ratios)
        running = batch.sequences[: batch.num_running]
        steps = work.steps - before.steps
        observation = Observation(
            now_s=now_s,
            seconds=max(1e-3, now_s - self._since_s),
            steps=steps,
            step_s=(work.step_s - before.step_s) / steps if steps else 0.0,
            tokens=work.tokens - before.tokens,
            good_tokens=self._good_tokens,
            num_running=len(running),
            num_waiting=batch.num_waiting + num_queued,
            p99_s=ratios[int(0.99 * (len(ratios) - 1))] if ratios else None,
            target_s=1.0 if ratios else None,
            preemptions=batch.num_preemptions - self._preemptions_before,
            kv_blocks_used=batch.allocator.used,
            kv_blocks_total=batch.allocator.num_blocks or NO_BLOCKS,
            memory_batch_limit=memory_batch_limit,
            cost=cost,
            mean_context_tokens=sum(len(s.tokens) for s in running) / len(running) if running else 0.0,
            telemetry=telemetry,
            first_token_s=median(seconds for _, seconds in self._first_s) if self._first_s else None,
            refusals=self._num_refused,
        )
        self._begin_period(work, now_s)
        return observation

    def _begin_period(self, work: Work, now_s: float) -> None:
        self._since_s = now_s
        self._before = work
        self._preemptions_before = self._batch.num_preemptions
        self._good_tokens = 0
        self._num_refused = 0


def _shares(served: Served, since_s: float, target: Target | None) -> list[float]:
    """Its latencies, those of first and last token counted from `since_s`, as shares of what they should be."""
    first_s, ended_s, num_gaps = served.first_token_s, served.ended_s, served.num_tokens - 1
    e2e_s = target.e2e_s if target else None
    if served.deadline_s is not None:
        e2e_s = served.deadline_s - served.arrival_s
    pairs = [(ended_s - since_s, e2e_s)]
    if target is not None and first_s is not None:
        if not served.is_resumed:
            pairs.append((first_s - since_s, target.ttft_s))
        if num_gaps > 0:
            pairs.append(((ended_s - first_s) / num_gaps, target.tpot_s))
    return [seconds / max(limit_s, 1e-3) for seconds, limit_s in pairs if limit_s is not None]
