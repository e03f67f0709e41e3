"""What the queue in memory remembers of a request beyond its wait, and of the engine processes that hold requests."""

import struct
from dataclasses import dataclass, field

from scheduling.core.answers import DropReason
from scheduling.core.request import QueueEntry


@dataclass(slots=True)
class Record:
    """Of a request that was claimed, has ended, or is kept otherwise than most. One that only waits has none."""

    entry: QueueEntry
    number: int
    body: bytes
    reply_to: str = ""
    keep_s: int = 60
    state: str = "queued"
    attempt: int = 0
    owner: str = ""
    """Who runs it; nobody while it waits or has ended."""
    flow: str = ""
    weight: float = 1.0
    rank: float = 0.0
    """Of the flow that was charged for it: where it goes back to while `epoch` is the queue's."""
    epoch: int = 0
    failures: int = 0
    journal: bytes | bytearray = b""
    cancelled: bool = False
    output: str = ""
    finish: bytes | None = None
    dropped: DropReason | None = None
    canceller: str = ""


@dataclass(slots=True)
class Owner:
    """An engine process and what it holds."""

    expires_s: float
    held: dict[str, Record] = field(default_factory=dict)
    cancels: list[str] = field(default_factory=list)
    number: int | None = None
    """Of the last claim, and what that gave."""
    given: list[tuple[str, int]] = field(default_factory=list)


def read_tokens(journal: bytes | bytearray) -> list[int]:
    """Token ids from their journal: little-endian int32."""
    return list(struct.unpack(f"<{len(journal) // 4}i", journal)) if journal else []
