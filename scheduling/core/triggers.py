"""When a batch that is being collected should start: triggers that combine, each saying why it fired."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from scheduling.core.request import Priority

MAX_TRIGGERS, MAX_DEPTH = 8, 4
"""Of an expression: triggers in one list, lists within lists."""


class TriggerError(Exception):
    """The trigger cannot be used; the message says why and what can."""


class BatchView(NamedTuple):
    """What a trigger sees of what waits for the next batch."""

    num_waiting: int
    oldest_wait_s: float = 0.0
    most_urgent: int | None = None
    """The highest priority among the waiting, that is the lowest number; None where nothing waits."""
    free_block_share: float = 1.0
    """KV blocks that would be left if all the waiting had theirs, as a share of all."""


@dataclass(frozen=True, slots=True)
class Fired:
    """The batch should start.

    `alone`: with none but the requests of the most urgent priority in it.
    """

    trigger: str
    reason: str
    alone: bool = False


class Trigger(Protocol):
    """Decides whether a batch starts. Stateless: the same view gets the same answer."""

    def check(self, view: BatchView) -> Fired | None:
        """Why the batch should start now; None where it should not."""
        ...

    def due_s(self, view: BatchView) -> float | None:
        """Seconds until it fires although nothing else happens (0 where it fires now); None where it never will."""
        ...


@dataclass(frozen=True, slots=True)
class SizeThreshold:
    """Enough wait to fill a batch."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"A batch holds at least one request, not {self.size}.")

    def check(self, view: BatchView) -> Fired | None:
        return Fired("size", f"{view.num_waiting} of {self.size} wait") if view.num_waiting >= self.size else None

    def due_s(self, view: BatchView) -> float | None:
        return 0.0 if self.check(view) else None


@dataclass(frozen=True, slots=True)
class OldestWait:
    """The oldest request has waited long enough."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"A wait is a number of seconds, 0 or more, not {self.seconds!r}.")

    def check(self, view: BatchView) -> Fired | None:
        if not view.num_waiting or view.oldest_wait_s < self.seconds:
            return None
        return Fired("wait", f"the oldest has waited {1000 * view.oldest_wait_s:.0f} ms")

    def due_s(self, view: BatchView) -> float | None:
        return max(0.0, self.seconds - view.oldest_wait_s) if view.num_waiting else None


@dataclass(frozen=True, slots=True)
class UrgentPresent:
    """A request of this priority or higher is there. With `alone` the urgent go by themselves."""

    priority: int = Priority.REALTIME
    alone: bool = False

    def check(self, view: BatchView) -> Fired | None:
        urgent = view.most_urgent
        if not view.num_waiting or urgent is None or urgent > self.priority:
            return None
        return Fired("urgent", f"a request of priority {Priority(urgent).name.lower()} is there", self.alone)

    def due_s(self, view: BatchView) -> float | None:
        return 0.0 if self.check(view) else None


@dataclass(frozen=True, slots=True)
class MemoryPressure:
    """What waits fills the KV cache but for this share: hardly any more could run with it."""

    free_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.free_share <= 1:
            raise ValueError(f"A share lies between 0 and 1, not at {self.free_share!r}.")

    def check(self, view: BatchView) -> Fired | None:
        if not view.num_waiting or view.free_block_share > self.free_share:
            return None
        return Fired("memory", f"what waits leaves {view.free_block_share:.0%} of KV blocks free")

    def due_s(self, view: BatchView) -> float | None:
        return 0.0 if self.check(view) else None


@dataclass(frozen=True, slots=True)
class AnyOf:
    """The first of these that fires. An urgent request that goes alone is worth naming first."""

    triggers: Sequence[Trigger]

    def check(self, view: BatchView) -> Fired | None:
        return next((fired for trigger in self.triggers if (fired := trigger.check(view))), None)

    def due_s(self, view: BatchView) -> float | None:
        return min((due for trigger in self.triggers if (due := trigger.due_s(view)) is not None), default=None)


@dataclass(frozen=True, slots=True)
class AllOf:
    """All of these at once. Goes alone where one of them says so."""

    triggers: Sequence[Trigger]

    def __post_init__(self) -> None:
        if not self.triggers:
            raise ValueError("All of nothing would always fire.")

    def check(self, view: BatchView) -> Fired | None:
        fired = [trigger.check(view) for trigger in self.triggers]
        those = [one for one in fired if one is not None]
        if len(those) < len(fired):
            return None
        reason = ", and ".join(one.reason for one in those)
        return Fired("+".join(one.trigger for one in those), reason, any(one.alone for one in those))

    def due_s(self, view: BatchView) -> float | None:
        dues = [trigger.due_s(view) for trigger in self.triggers]
        known = [due for due in dues if due is not None]
        return max(known) if len(known) == len(dues) else None


def batch_triggers(
    size: int = 8, wait_s: float = 0.05, *, urgent: int = Priority.REALTIME, alone: bool = False
) -> AnyOf:
    """What suits most: an urgent request at once, a full batch, or the oldest waited `wait_s`."""
    return AnyOf((UrgentPresent(urgent, alone), SizeThreshold(size), OldestWait(wait_s)))


def parse_trigger(expression: Any) -> Trigger | None:
    """A trigger from its JSON form; None for an empty one. Raises TriggerError with a sentence.

    One key each: `{"size": 8}`, `{"wait_s": 0.05}`, `{"urgent": 1}` (a priority), `{"urgent_alone": 1}`,
    `{"memory": 0.1}` (share of KV blocks left by what waits), `{"any": [...]}`, `{"all": [...]}`.
    """
    return None if expression == {} else _parse(expression, depth=0)


def _parse(expression: Any, depth: int) -> Trigger:
    if not isinstance(expression, dict) or len(expression) != 1:
        raise TriggerError(f'A trigger is an object with one key, such as {{"size": 8}}, not {expression!r:.100}.')
    [(kind, value)] = expression.items()
    if kind in ("any", "all"):
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_TRIGGERS or depth == MAX_DEPTH:
            raise TriggerError(f'"{kind}" needs a list of 1 to {MAX_TRIGGERS} triggers, at most {MAX_DEPTH} deep.')
        triggers = tuple(_parse(one, depth + 1) for one in value)
        return AnyOf(triggers) if kind == "any" else AllOf(triggers)
    build = _BUILDERS.get(kind)
    if build is None:
        raise TriggerError(f"There is no trigger {kind!r:.50}; there are {', '.join([*_BUILDERS, 'any', 'all'])}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TriggerError(f'"{kind}" needs a number, not {value!r:.50}.')
    try:
        return build(value)
    except (ValueError, OverflowError) as error:
        raise TriggerError(f'"{kind}": {error}') from error


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"A whole number is needed, not {value!r}.")
    return int(value)


_BUILDERS: dict[str, Callable[[float], Trigger]] = {
    "size": lambda value: SizeThreshold(_whole(value)),
    "wait_s": OldestWait,
    "urgent": lambda value: UrgentPresent(Priority(_whole(value))),
    "urgent_alone": lambda value: UrgentPresent(Priority(_whole(value)), alone=True),
    "memory": MemoryPressure,
}


class TriggerLog:
    """Which triggers started batches, how often, and the latest one's reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.latest: Fired | None = None

    def note(self, fired: Fired) -> Fired:
        """Count one that fired; returns it."""
        self.counts[fired.trigger] += 1
        self.latest = fired
        return fired
