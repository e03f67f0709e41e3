"""What an engine process counts: cumulative numbers, latencies, and the second that is under way. Owned by the loop."""

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

from inference.messages import LATENCY_BUCKETS_S, BatchEvent, BatchMode, FinishReason, Histogram, SizeChange
from inference.worker.active import ActiveRequest
from scheduling.core.sizing.cost_model import NO_STEPS, StepFeatures

STEP_WINDOW = 512
"""Steps over which percentiles are taken."""


class Latencies:
    """A histogram over LATENCY_BUCKETS_S."""

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value; a clock that went back counts as 0."""
        seconds = max(0.0, seconds)
        self._counts[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        self._sum_s += seconds

    def read(self) -> Histogram:
        """The counts so far."""
        return Histogram(list(self._counts), self._sum_s)


@dataclass(slots=True)
class Second:
    """Sums of one second."""

    started_s: float
    steps: int = 0
    sequences: int = 0
    batch_size_max: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    step_s: float = 0.0
    step_s_max: float = 0.0
    preemptions: int = 0
    busy_s: float = 0.0
    features: StepFeatures = NO_STEPS
    size_changes: list[SizeChange] = field(default_factory=list)


@dataclass(slots=True)
class Meters:
    """Counters of one engine process. Times are unix seconds unless they say otherwise."""

    second: Second
    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    step_total_s: float = 0.0
    busy_total_s: float = 0.0
    """Time in steps and in the loop around them."""
    tokens_per_s: float = 0.0
    queue_time: Latencies = field(default_factory=Latencies)
    time_to_first_token: Latencies = field(default_factory=Latencies)
    time_per_output_token: Latencies = field(default_factory=Latencies)
    end_to_end: Latencies = field(default_factory=Latencies)
    step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=STEP_WINDOW))

    def count_step(
        self,
        *,
        batch_size: int,
        prompt_tokens: int,
        output_tokens: int,
        seconds: float,
        features: StepFeatures = NO_STEPS,
    ) -> None:
        """A forward pass over `batch_size` sequences that read so many prompt tokens and gave so many output tokens.

        `features` is what its cost is learned from, later, from the history.
        """
        self.steps += 1
        self.step_total_s += seconds
        self.step_times_s.append(seconds)
        self.output_tokens += output_tokens
        self.prompt_tokens += prompt_tokens
        second = self.second
        second.steps += 1
        second.sequences += batch_size
        second.batch_size_max = max(second.batch_size_max, batch_size)
        second.prompt_tokens += prompt_tokens
        second.output_tokens += output_tokens
        second.step_s += seconds
        second.step_s_max = max(second.step_s_max, seconds)
        second.features = second.features.plus(features)

    def count_busy(self, seconds: float) -> None:
        """A turn of the loop that took a step, with all that belongs to it."""
        self.busy_total_s += seconds
        self.second.busy_s += seconds

    def count_end(self, active: ActiveRequest, reason: FinishReason, now_s: float) -> None:
        """A request ended."""
        self.finished[reason] += 1
        arrival_s = active.request.arrival_s
        self.end_to_end.observe(now_s - arrival_s)
        if active.first_token_s is not None and active.num_new_tokens > 1:
            self.time_per_output_token.observe((now_s - active.first_token_s) / (active.num_new_tokens - 1))

    def step_ms(self, share: float) -> float:
        """Percentile of the last steps' times, in ms; 0 before the first step."""
        times = sorted(self.step_times_s)
        return 1000 * times[min(len(times) - 1, int(share * len(times)))] if times else 0.0

    @property
    def overhead_percent(self) -> float:
        """Share of the busy loop's time that was not the forward pass."""
        return 100 * (1 - self.step_total_s / self.busy_total_s) if self.busy_total_s else 0.0

    def close_second(
        self,
        now_s: float,
        *,
        replica: str,
        model: str,
        mode: BatchMode,
        kv_blocks_used: int,
        kv_blocks_total: int,
        preemptions: int,
        policy: str,
        policy_revision: int,
    ) -> BatchEvent | None:
        """The record of the clock's second that is over, once it is; None before, and where nothing ran in it.

        What began in the latter half of a second, after a halt, is told with the next.
        """
        second = self.second
        elapsed, told_s = now_s - second.started_s, int(second.started_s + 0.5)
        if elapsed >= 0 and now_s < told_s + 1:
            return None
        self.second = Second(started_s=now_s)
        self.second.preemptions = preemptions
        self.tokens_per_s = second.output_tokens / elapsed if elapsed > 0 else 0.0
        if not second.steps:
            self.second.size_changes = second.size_changes  # told with the next second in which something runs
            return None
        return BatchEvent(
            replica=replica,
            model=model,
            second_s=told_s,
            steps=second.steps,
            batch_size_mean=second.sequences / second.steps,
            batch_size_max=second.batch_size_max,
            prompt_tokens=second.prompt_tokens,
            output_tokens=second.output_tokens,
            step_ms_mean=1000 * second.step_s / second.steps,
            step_ms_max=1000 * second.step_s_max,
            kv_blocks_used=kv_blocks_used,
            kv_blocks_total=kv_blocks_total,
            preemptions=preemptions - second.preemptions,
            mode=mode,
            policy=policy,
            policy_revision=policy_revision,
            busy_ms=1000 * second.busy_s,
            prefill_tokens=second.features.prefill_tokens,
            decode_sequences=second.features.decode_sequences,
            context_tokens=second.features.context_tokens,
            attention_pairs=second.features.attention_pairs,
            size_changes=second.size_changes,
        )
