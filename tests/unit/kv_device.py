"""A device for planners under test: it remembers which token each place of each KV block was computed for."""

from scheduling.core.planner import StepOutput, StepPlanner
from scheduling.core.sequence import PartResult, Sequence, StepPart


class KVDevice:
    """Computes steps of a planner and checks that every token attends to the right keys and values."""

    def __init__(self, planner: StepPlanner, num_host_blocks: int = 0) -> None:
        self.planner = planner
        size = planner.allocator.block_size
        self.blocks: list[list[tuple[int, ...]]] = [[()] * size for _ in range(planner.allocator.num_blocks)]
        self.host: list[list[tuple[int, ...]]] = [[()] * size for _ in range(num_host_blocks)]
        self.num_computed = 0
        self.now = 0.0

    def step(self, token_id: int = 5) -> list[StepOutput]:
        """Plan, copy, compute, apply; checks integrity before and after."""
        parts = self.planner.plan(self.now)
        self.planner.check_integrity()
        for direction, pairs in self.planner.take_moves():
            source, target = (self.blocks, self.host) if direction == "out" else (self.host, self.blocks)
            for a, b in pairs:
                target[b] = list(source[a])
        assert sum(part.num_tokens for part in parts) <= self.planner.step_tokens
        for part in parts:
            self._compute(part)
        outputs = self.planner.apply(parts, [PartResult(token_id if part.samples else None) for part in parts])
        self.planner.check_integrity()
        self.now += 0.02
        return outputs

    def run(self, max_steps: int = 10_000) -> list[str]:
        """Step until nothing is left; the sequences in the order of their ends."""
        ended: list[str] = []
        for _ in range(max_steps):
            if not self.planner.sequences:
                return ended
            ended += [output.sequence.id for output in self.step() if output.finish]
        raise AssertionError(f"still running: {[s.id for s in self.planner.sequences]}")

    def _compute(self, part: StepPart) -> None:
        sequence, size = part.sequence, self.planner.allocator.block_size
        end = sequence.num_computed + part.num_tokens
        for position in range(sequence.num_computed, end):
            block = sequence.block_table[position // size]
            assert self.planner.allocator.num_own([block]), "a shared block is written"
            self.blocks[block][position % size] = content(sequence, position)
        for position in range(end):
            block = sequence.block_table[position // size]
            assert self.blocks[block][position % size] == content(sequence, position), "wrong keys and values"
        self.num_computed += part.num_tokens


def content(sequence: Sequence, position: int) -> tuple[int, ...]:
    """What keys and values depend on: the token there and all before it."""
    return tuple(sequence.tokens[: position + 1])
