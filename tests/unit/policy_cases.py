"""Requests, queues and claims for tests of policies."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from scheduling.core.policies import Policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry

NO_LIMIT = 2**62


def entry_of(
    number: int = 0,
    *,
    tenant: str = "ada",
    priority: int = 3,
    arrival_s: float = 0.0,
    prompt: int = 10,
    output: int = 10,
    share: float = 1.0,
    deadline_s: float | None = None,
) -> QueueEntry:
    return QueueEntry(
        id=f"r{number:05d}",
        tenant=tenant,
        priority=priority,
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        max_tokens=output,
        share=share,
        deadline_s=deadline_s,
    )


TIMES = st.integers(0, 8_000).map(lambda eighths: eighths / 8)
"""Times that stay exact when large numbers are added to them."""
FIELDS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(["ada", "bob", "cleo"]),
        "priority": st.integers(0, 5),
        "arrival_s": TIMES,
        "prompt": st.integers(1, 4000),
        "output": st.integers(1, 4000),
        "share": st.floats(0.1, 10.0),
        "deadline_s": st.none() | TIMES,
    }
)
ENTRIES = st.lists(FIELDS, max_size=16).map(lambda rows: [entry_of(i, **row) for i, row in enumerate(rows)])


class Served:
    """A queue under one policy, on a clock that the test moves."""

    def __init__(self, policy: Policy, entries: Sequence[QueueEntry] = ()) -> None:
        self.policy = policy
        self.now = 0.0
        self.queue = FlowQueue(clock=lambda: self.now)
        self.queue.init_policy(policy.name, policy.params, 1)
        self.entries: dict[str, QueueEntry] = {}
        self.put(*entries)

    def put(self, *entries: QueueEntry) -> None:
        for entry in entries:
            self.entries[entry.id] = entry
            place = self.policy.place(entry)
            assert self.queue.enqueue(entry, place, revision=1, depth_limit=NO_LIMIT).status == "queued"

    def claim(self, num: int = NO_LIMIT) -> list[QueueEntry]:
        claimed = self.queue.claim("gpu", max_requests=num, max_tokens=NO_LIMIT, lease_s=1e9)
        return [self.entries[request.id] for request in claimed.requests]

    def ids(self, num: int = NO_LIMIT) -> list[str]:
        return [entry.id for entry in self.claim(num)]

    def finish(self, entry: QueueEntry, output_tokens: int) -> None:
        used = entry.prompt_tokens + output_tokens
        assert self.queue.finish("gpu", entry.id, 1, state="finished", used_tokens=used, finish=b"", output="")
