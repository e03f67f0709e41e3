"""One simulated engine: the real planner and block accounting, with a cost model in place of the forward pass."""

from collections import Counter, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from scheduling.core.planner import StepOutput, StepPlanner
from scheduling.core.room import Room, UrgentRoom
from scheduling.core.sequence import PartResult, SamplingParams, Sequence, StepPart
from scheduling.core.simulation.memory import OwnPrefix
from scheduling.core.simulation.outcome import Outcome
from scheduling.core.sizing.cost_model import StepCost, StepFeatures, SwapLink, cheaper_preemption, measure_parts
from scheduling.core.swap import SwapSpace

EOS = 0
"""The simulated end-of-sequence token."""
TOKEN = 1
NO_END = 2**62

_SAMPLING = SamplingParams()
_NO_TOKEN, _NEXT, _LAST = PartResult(), PartResult(TOKEN), PartResult(EOS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSettings:
    """Preempted sequences may go to host memory over this link."""

    link: SwapLink
    kv_bytes_per_token: int
    num_blocks: int = 2**16
    """Places for KV blocks in host memory."""

    def make_space(self, block_size: int, cost: StepCost) -> SwapSpace:
        """Host memory, used where that costs less time than computing again."""

        def pays(num_tokens: int) -> bool:
            how = cheaper_preemption(cost, self.link, num_tokens=num_tokens, kv_bytes_per_token=self.kv_bytes_per_token)
            return how == "swap"

        return SwapSpace(self.num_blocks, block_size, pays)


class SimulatedSequence(Sequence):
    """A sequence that knows how long its answer will be."""

    __slots__ = ("final_tokens", "outcome")

    def __init__(self, request_id: str, attempt: int, outcome: Outcome) -> None:
        request = outcome.request
        super().__init__(
            id=request_id,
            attempt=attempt,
            tenant=request.tenant,
            priority=request.priority,
            arrival_s=request.arrival_s,
            tokens=[TOKEN] * request.prompt_tokens,
            num_prompt_tokens=request.prompt_tokens,
            max_tokens=request.max_tokens,
            sampling=_SAMPLING,
        )
        self.outcome = outcome
        self.final_tokens = request.prompt_tokens + request.output_tokens


class OnItsWay(NamedTuple):
    """A claimed sequence that the engine takes at its first turn from `ready_s` on."""

    sequence: SimulatedSequence
    ready_s: float


class SimulatedReplica:
    """Runs steps of its planner in virtual time.

    `plan` plans a step, `start` sets `busy_until_s`, and `end_step` applies it then. A run of steps in which the same
    sequences each decode one token, which nothing from outside can change, is taken as one (nothing can before
    `horizon_s`, and where room opens not before `claimable_s`, when something waits); every clock reading and every
    count is the same as if each step were planned.
    """

    def __init__(
        self,
        planner: StepPlanner,
        cost: StepCost,
        *,
        swap: SwapSettings | None = None,
        pace: Items[float] = (),
        fast_forward: bool = True,
    ) -> None:
        assert planner.prefix is None or isinstance(planner.prefix, OwnPrefix), "all simulated tokens are alike"
        self.planner = planner
        self.on_its_way: deque[OnItsWay] = deque()
        self.busy_until_s: float | None = None
        self.looked_s = 0.0
        """When the engine claimed last, or tried to."""
        self.look_s: float | None = None
        """When it looks, full as it is, for a request that may take the place of a lower one; None: for nobody."""
        self.steps = 0
        self.busy_s = 0.0
        self.tokens = 0
        """Output tokens made."""
        self.batch_sizes: Counter[int] = Counter()
        self._cost = cost
        self._swap = swap
        self._pace = pace
        self._fast_forward = fast_forward
        self._parts: list[StepPart] = []
        self._room: Room | None = None
        """The planner's room; None when it may have changed."""

    @property
    def room(self) -> Room:
        """What may be claimed beside what is on its way already."""
        if self._room is None:
            self._room = self.planner.room()
        room = self._room
        if not self.on_its_way or not room.requests:
            return room
        tokens = room.tokens - sum(len(one.sequence.tokens) for one in self.on_its_way)
        return Room(max(0, room.requests - len(self.on_its_way)), max(0, tokens))

    @property
    def urgent_room(self) -> UrgentRoom | None:
        """What may be claimed to take the place of something lower, one after the other."""
        return None if self.on_its_way else self.planner.urgent_room()

    @property
    def ready_s(self) -> float:
        """When the first of what is on its way is there."""
        return self.on_its_way[0].ready_s if self.on_its_way else inf

    def add(self, sequence: SimulatedSequence) -> None:
        """Give the planner what has arrived. Raises RequestTooLongError."""
        self._room = None
        self.planner.add(sequence)

    def set_batch_size(self, max_batch_size: int) -> None:
        """For claims from now on, and the steps that are planned from now on."""
        self._room = None
        self.planner.set_batch_size(max_batch_size)

    def plan(self, now_s: float) -> bool:
        """Plan a step; False where there is nothing to run."""
        self._parts, self._room = self.planner.plan(now_s), None
        return bool(self._parts)

    def start(self, now_s: float, horizon_s: float, claimable_s: float) -> float:
        """Compute what was planned; when that will be done."""
        parts = self._parts
        features = measure_parts(parts)
        factor = self._pace[int(now_s)] if now_s < len(self._pace) else 1.0
        if self._pace:
            horizon_s = min(horizon_s, int(now_s) + 1.0)
        seconds = self._cost.price(features) * factor
        if self._swap is not None:
            link, bytes_each = self._swap.link, self._swap.kv_bytes_per_token * self.planner.allocator.block_size
            seconds += sum(link.transfer_s(len(move.pairs) * bytes_each) for move in self.planner.take_moves())
        self.busy_until_s = now_s + seconds
        num_steps = 1
        self.busy_s += seconds
        if self._fast_forward and features.decode_sequences == self.planner.num_running:
            num_steps = self._run_ahead(features, factor, horizon_s, claimable_s)
        self.steps += num_steps
        self.batch_sizes[len(parts)] += num_steps
        return self.busy_until_s

    def end_step(self) -> list[StepOutput]:
        """Apply the step that ends now: who got a first token or ended. Other tokens are not told of."""
        parts, self._parts, self.busy_until_s, self._room = self._parts, [], None, None
        planned: list[StepPart] = []
        for part in parts:
            sequence = part.sequence
            assert isinstance(sequence, SimulatedSequence)
            tokens = sequence.tokens
            if part.samples and len(tokens) + 1 < sequence.final_tokens and sequence.outcome.first_token_s is not None:
                # All that the planner would do for a token that is neither the first nor the last.
                tokens.append(TOKEN)
                sequence.num_computed += part.num_tokens
            else:
                planned.append(part)
        outputs = self.planner.apply(planned, [_sample(part) for part in planned])
        self.tokens += len(parts) - len(planned) + len(outputs)
        return outputs

    def _run_ahead(self, features: StepFeatures, factor: float, horizon_s: float, claimable_s: float) -> int:
        """Take further steps of the same kind, up to the first that ends at the horizon; how many there were in all.

        The last of them is left to `end_step`. Sums are formed in the order in which single steps form them.
        """
        assert self.busy_until_s is not None
        limit, foreseen = self._steps_until_change() if self.busy_until_s < horizon_s else (1, 1)
        num_steps, end_s, busy_s = 1, self.busy_until_s, self.busy_s
        sequences, context = features.decode_sequences, features.context_tokens
        fixed_s = self._cost.price(features._replace(context_tokens=0))
        context_token_s = self._cost.context_token_s
        # From where an end is foreseen there is room for a claim.
        for until, before_s in ((min(limit, foreseen), horizon_s), (limit, min(horizon_s, claimable_s))):
            while num_steps < until and end_s < before_s:
                context += sequences
                seconds = (fixed_s + context * context_token_s) * factor
                end_s += seconds
                busy_s += seconds
                num_steps += 1
        if num_steps > 1:
            self.busy_until_s, self.busy_s = end_s, busy_s
            self._decode_at_once(num_steps - 1)
        return num_steps

    def _steps_until_change(self) -> tuple[int, int]:
        """Steps up to the one in which a sequence ends, and up to the one before the planner foresees an end.

        As far as there are KV blocks for all.
        """
        sequences = [part.sequence for part in self._parts]
        steps = foreseen = NO_END
        for sequence in sequences:
            assert isinstance(sequence, SimulatedSequence)
            if sequence.outcome.first_token_s is None:
                # The last token of a prompt, alone in its chunk, looks like a decode; its time is a first token's.
                return 1, 1
            length = len(sequence.tokens)
            steps = min(steps, sequence.final_tokens - length)
            foreseen = min(foreseen, max(1, sequence.num_prompt_tokens + sequence.max_tokens - 1 - length))
        return self._steps_with_blocks(sequences, steps), foreseen

    def _steps_with_blocks(self, sequences: list[Sequence], steps: int) -> int:
        """How many of these steps there are KV blocks for."""
        allocator = self.planner.allocator
        room = allocator.num_blocks - allocator.used

        def missing(more: int) -> int:
            return sum(max(0, allocator.blocks_for(len(s.tokens) + more) - len(s.block_table)) for s in sequences)

        if missing(steps - 1) <= room:
            return steps
        low, high = 1, steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if missing(middle - 1) <= room else (low, middle)
        return low

    def _decode_at_once(self, num_tokens: int) -> None:
        """Give each sequence of the step so many tokens, and blocks for them, as single steps would."""
        allocator = self.planner.allocator
        tokens = [TOKEN] * num_tokens
        for part in self._parts:
            sequence = part.sequence
            sequence.tokens += tokens
            sequence.num_computed += num_tokens
            blocks = allocator.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
            if blocks > 0:
                sequence.block_table += allocator.allocate(blocks)
        self.tokens += num_tokens * len(self._parts)
        self._room = None


def _sample(part: StepPart) -> PartResult:
    """The next token of a part's sequence, the last of which ends it."""
    if not part.samples:
        return _NO_TOKEN
    sequence = part.sequence
    assert isinstance(sequence, SimulatedSequence)
    return _LAST if len(sequence.tokens) + 1 == sequence.final_tokens else _NEXT
