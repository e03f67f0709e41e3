"""The batch of an upstream replica: how many requests may be with the server at once, and which are."""

from collections.abc import Mapping
from dataclasses import dataclass

from inference.worker.active import ActiveRequest
from scheduling.core.forming import Mode
from scheduling.core.sequence import Sequence
from scheduling.core.triggers import Trigger, TriggerLog


@dataclass(frozen=True, slots=True)
class NoBlocks:
    """The KV cache is the server's; nothing is known of it."""

    num_blocks: int = 0
    block_size: int = 16
    used: int = 0
    num_cached: int = 0


class Slots:
    """What sizing and status see in place of a planner. The server forms its batches itself: there is one mode."""

    mode: Mode = "continuous"
    num_waiting = num_preemptions = num_slot_preemptions = 0
    prefix = swap = drafter = None
    allocator = NoBlocks()
    long_prefill_threshold = 0

    def __init__(self, size: int) -> None:
        self.batch_size = size
        self.trigger_log = TriggerLog()
        self.active: Mapping[str, ActiveRequest] = {}
        """What the loop holds; it puts its own here."""

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def sequences(self) -> list[Sequence]:
        return [active.sequence for active in self.active.values()]

    def attempts(self) -> dict[str, int]:
        """Of each request that is held here, which attempt it is."""
        return {id_: active.attempt for id_, active in self.active.items()}

    @property
    def num_running(self) -> int:
        return len(self.active)

    def set_batch_size(self, max_batch_size: int) -> None:
        """From now on; what runs goes on."""
        self.batch_size = max_batch_size

    def set_mode(self, mode: Mode) -> None:
        """A server's mode is its own."""

    def set_trigger(self, trigger: Trigger | None) -> None:
        """Nothing is collected here."""
