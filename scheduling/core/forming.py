"""How batches form: when waiting sequences may join in each mode, and who may run together."""

from collections.abc import Sequence as Items
from typing import Literal

from scheduling.core.roster import Entry
from scheduling.core.triggers import AnyOf, BatchView, Fired, OldestWait, SizeThreshold, Trigger, TriggerLog

Mode = Literal["serial", "static", "dynamic", "continuous"]
DYNAMIC_WAIT_S = 0.05
"""How long `dynamic` lets the oldest request wait for its batch to fill, unless triggers are given."""
SUSPECT_SHARE = 2
"""Sequences over which an engine process has ended once run with others of that kind, half a batch at a time.

Most ends are nobody's fault, and then this is what they cost.
"""


class BatchFormer:
    """Says when a new batch starts. In `continuous` mode and `serial` always; in the others when a trigger fires.

    Without triggers of its own `dynamic` starts a full batch, or any once its oldest has waited DYNAMIC_WAIT_S, and
    `static` whatever waits. A batch that is full starts whatever the triggers say: it could not grow.
    """

    def __init__(self, mode: Mode, trigger: Trigger | None = None) -> None:
        self.mode = mode
        self.trigger = trigger
        self.log = TriggerLog()

    @property
    def collects(self) -> bool:
        """Whether batches are started by triggers."""
        return self.mode == "dynamic" or (self.mode == "static" and self.trigger is not None)

    def check(self, view: BatchView, max_batch_size: int) -> Fired | None:
        """Why a new batch starts now; None where it does not."""
        return self._triggers(max_batch_size).check(view)

    def due_s(self, view: BatchView, max_batch_size: int) -> float:
        """Seconds until a batch starts although nothing else happens."""
        due_s = self._triggers(max_batch_size).due_s(view)
        return DYNAMIC_WAIT_S if due_s is None else due_s

    def _triggers(self, max_batch_size: int) -> Trigger:
        # The operator's own come first: one that fires as well may want a request to go alone.
        return AnyOf((self.trigger or OldestWait(DYNAMIC_WAIT_S), SizeThreshold(max_batch_size)))


def view_batch(waiting: Items[Entry], now: float, free_block_share: float) -> BatchView:
    """What triggers see."""
    return BatchView(
        num_waiting=len(waiting),
        oldest_wait_s=now - min(entry.added_s for entry in waiting) if waiting else 0.0,
        most_urgent=min((entry.sequence.priority for entry in waiting), default=None),
        free_block_share=free_block_share,
    )


def may_join(entry: Entry, running: Items[Entry], max_batch_size: int) -> bool:
    """Whether a sequence may run beside those that do, so that one that ends engine processes ends few others' runs.

    Whatever was in the batch of a process that ended is suspect. After one such end it runs in a small group of its
    kind, after two alone. A sequence that is to blame fails a third time there, and is given up; the innocent end.
    """
    failures = entry.sequence.failures
    if not running:
        return True
    if failures != running[0].sequence.failures or failures > 1:
        return False
    return not failures or len(running) < max(1, max_batch_size // SUSPECT_SHARE)
