"""What a queue answers. The in-memory queue and the one in Redis give the same values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

TOTALS = (
    "enqueued",
    "claimed",
    "claimed_tokens",
    "finished",
    "finished_tokens",
    "cancelled",
    "requeued",
    "shed",
    "expired",
)
"""What a queue counts; `*_total` of a snapshot."""

DropReason = Literal["shed", "deadline_exceeded"]


@dataclass(frozen=True, slots=True)
class Shed:
    """A waiting request that was dropped: for one of higher priority, or since its deadline had passed.

    Whoever gets this ends it towards its client and tenant, see `end_shed`.
    """

    id: str
    body: bytes
    reason: DropReason = "shed"


class Enqueued(NamedTuple):
    """`queued`, or why not.

    `stale`: another revision is active (`revision`), place again and retry. `full`: `depth` has reached the limit
    given, or else `waiting_tokens` and this request's are over theirs. `duplicate`: a request of this id is there
    already; who repeats a call after a lost reply (redis-py does so by itself) takes it for `queued`.
    """

    status: Literal["queued", "stale", "full", "duplicate"]
    depth: int
    revision: int
    shed: tuple[Shed, ...] = ()
    """Who was dropped to make room; the caller ends them (`end_shed`)."""
    waiting_tokens: int | None = None
    """Where the limit on tokens refused: how many wait."""


class ClaimedRequest(NamedTuple):
    """A request an engine process now holds: its body, which attempt this is (from 1), the output tokens so far."""

    id: str
    body: bytes
    attempt: int
    tokens: list[int]
    failures: int = 0
    """How often an engine process ended, other than in good order, while it held this."""


class Claimed(NamedTuple):
    """Requests in the order they were served, the policy they were ordered by, and how many still wait."""

    revision: int
    policy: str
    requests: list[ClaimedRequest]
    depth: int
    dropped: tuple[Shed, ...] = ()
    """Who was dropped since its deadline had passed; the caller ends them (`end_shed`). A repeated claim names none."""
    more: bool = False
    """The claim reached the bound of what one call drops, and served nobody: claim again at once."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Where a cancelled request was.

    `queued`: it left the queue; the caller settles its limits and writes its history from `body`. `running`: `owner`
    was told to stop it. `gone`: unknown, or ended before.
    """

    status: Literal["queued", "running", "gone"]
    body: bytes | None = None
    owner: str = ""


@dataclass(frozen=True, slots=True)
class ActivePolicy:
    """The policy that orders the queue, as it was switched on."""

    revision: int
    name: str
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """Counts at one moment; `*_total` only grow. Tokens of a request that has not ended: prompt plus `max_tokens`."""

    depth: int = 0
    waiting_tokens: int = 0
    by_priority: dict[int, int] = field(default_factory=dict)
    by_tenant: dict[str, int] = field(default_factory=dict)
    running: int = 0
    oldest_arrival_s: float | None = None
    enqueued_total: int = 0
    claimed_total: int = 0
    claimed_tokens_total: int = 0
    finished_total: int = 0
    finished_tokens_total: int = 0
    cancelled_total: int = 0
    """Cancelled while waiting; those cancelled while running are counted as finished."""
    requeued_total: int = 0
    shed_total: int = 0
    """Dropped while waiting, for requests of higher priority."""
    expired_total: int = 0
    """Dropped while waiting, since their deadline had passed."""
    revision: int = 0
    policy: str = "fifo"
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestRecordView:
    """A request's record, until `keep_s` after its end. `output` and `finish` are set once it ended."""

    state: str
    attempt: int
    output: str
    finish: bytes | None
    num_tokens: int
    body: bytes
    dropped: DropReason | None = None
    """Why it was dropped while it waited, if it was."""


@dataclass(frozen=True, slots=True)
class Position:
    """How many requests go before this one.

    `in_flow` is exact at this moment. `overall` is exact with one flow; with several it is an estimate that takes every
    waiting request for one of mean cost. Later arrivals of a better rank are foreseen by neither.
    """

    flow: str
    in_flow: int
    overall: int
