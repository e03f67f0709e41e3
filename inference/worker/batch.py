"""What sizing, commands and the status need of a running batch, be it planned here or by a server elsewhere."""

from typing import Protocol

from scheduling.core.forming import Mode
from scheduling.core.prefix import PrefixCache
from scheduling.core.sizing.observer import Blocks as CountedBlocks
from scheduling.core.sizing.observer import RunningBatch
from scheduling.core.speculation import Drafter
from scheduling.core.swap import SwapSpace
from scheduling.core.triggers import Trigger, TriggerLog


class Blocks(CountedBlocks, Protocol):
    """KV blocks, as far as they are counted; none at all where the cache is elsewhere."""

    @property
    def block_size(self) -> int: ...
    @property
    def num_cached(self) -> int: ...


class Batch(RunningBatch, Protocol):
    """`scheduling.core.planner.StepPlanner`, or `inference.upstream.slots.Slots`."""

    long_prefill_threshold: int

    @property
    def mode(self) -> Mode: ...
    @property
    def batch_size(self) -> int:
        """The size that was set."""
        ...

    @property
    def max_batch_size(self) -> int:
        """The size that the mode makes of it."""
        ...

    @property
    def num_slot_preemptions(self) -> int: ...
    @property
    def allocator(self) -> Blocks: ...
    @property
    def prefix(self) -> PrefixCache | None: ...
    @property
    def swap(self) -> SwapSpace | None: ...
    @property
    def drafter(self) -> Drafter | None: ...
    @property
    def trigger_log(self) -> TriggerLog: ...

    def set_batch_size(self, max_batch_size: int) -> None:
        """From now on; what runs goes on."""
        ...

    def set_mode(self, mode: Mode) -> None:
        """From now on."""
        ...

    def set_trigger(self, trigger: Trigger | None) -> None:
        """From now on."""
        ...
