"""Claims for requests that take the slot of a lower one: only the head, only if high enough, only where that counts."""

import pytest

from scheduling.core.policies import POLICIES, build_policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import Priority, QueueEntry


def make_queue(policy: str, *waiting: tuple[str, int, float]) -> FlowQueue:
    queue = FlowQueue(clock=lambda: 0.0)
    built = build_policy(policy)
    queue.init_policy(policy, built.params, 1)
    for id_, priority, arrival_s in waiting:
        entry = QueueEntry(id=id_, tenant="t", priority=priority, arrival_s=arrival_s, prompt_tokens=5, max_tokens=5)
        queue.enqueue(entry, built.place(entry), revision=1, depth_limit=100)
    return queue


def claim_urgently(queue: FlowQueue, max_priority: int) -> list[str]:
    claimed = queue.claim("gpu", max_requests=1, max_tokens=100, lease_s=9.0, max_priority=max_priority)
    return [request.id for request in claimed.requests]


def test_the_head_is_given_where_it_is_high_enough() -> None:
    queue = make_queue("priority", ("low", Priority.LOW, 1.0), ("high", Priority.HIGH, 2.0))
    assert claim_urgently(queue, Priority.REALTIME) == []
    assert claim_urgently(queue, Priority.HIGH) == ["high"]
    assert claim_urgently(queue, Priority.HIGH) == []


def test_one_that_has_aged_goes_first_and_takes_no_slot() -> None:
    queue = make_queue("priority", ("aged", Priority.BULK, 1.0), ("high", Priority.HIGH, 500.0))
    assert claim_urgently(queue, Priority.HIGH) == []


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"priority"}))
def test_no_other_policy_lets_a_level_outrank_another(policy: str) -> None:
    queue = make_queue(policy, ("critical", Priority.CRITICAL, 1.0))
    assert claim_urgently(queue, Priority.LOW) == []
    assert queue.claim("gpu", max_requests=1, max_tokens=100, lease_s=9.0).requests
