"""Gives back what dead processes held: leases of engine processes, requests of web processes, slots of tenants.

Every step is idempotent, so any number of sweepers may run at once, and one that dies half-way has done no harm.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import redis

from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import Command, execute, execute_many
from scheduling.switch import place_unplaced

GRACE_S = 15.0
"""A slot this young may belong to a request on its way into the queue, or to one whose end is being settled."""


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep of one queue did."""

    expired: list[tuple[str, int]] = field(default_factory=list)
    """Owners whose lease ended, and how many of their requests went back."""
    placed: int = 0
    """Requests left unplaced by a switch that are in order now."""
    cancelled: list[bytes] = field(default_factory=list)
    """Bodies of waiting requests that were cancelled; the caller settles their limits and writes their history."""
    stopping: int = 0
    """Running requests whose owner was told to stop them."""


class Sweeper:
    """Sweeps queues and tenants on one Redis."""

    def __init__(self, client: redis.Redis, keys: Keys, *, clock: Callable[[], float] = time.time) -> None:
        self._client = client
        self._keys = keys
        self._clock = clock
        self._limits = TenantLimits(keys)

    def sweep(self, model: str) -> SweepResult:
        """Expire leases, place what a switch left unplaced, cancel the requests of silent web processes."""
        queue = FleetQueue(self._keys, model)
        expired = execute(self._client, queue.expire())
        placed = place_unplaced(self._client, queue)
        ids = [id_ for web in self.silent_webs() for id_ in execute(self._client, queue.reply_to_requests(web))]
        answers = execute_many(self._client, [queue.cancel(id_) for id_ in ids]) if ids else []
        cancelled = [answer.body for answer in answers if answer.status == "queued"]
        return SweepResult(expired, placed, cancelled, sum(answer.status == "running" for answer in answers))

    def silent_webs(self) -> list[str]:
        """Web processes whose heartbeat ran out."""
        args = ("ZRANGEBYSCORE", self._keys.webs, "-inf", repr(self._clock()))
        return execute(self._client, Command(args, lambda reply: [web.decode() for web in reply]))

    def forget_webs(self, models: Iterable[str]) -> list[str]:
        """Remove silent web processes that have no request left in any of these queues, with their reply streams."""
        queues = [FleetQueue(self._keys, model) for model in models]
        forgotten = []
        for web in self.silent_webs():
            if any(execute(self._client, queue.reply_to_requests(web)) for queue in queues):
                continue
            self._client.zrem(self._keys.webs, web)
            self._client.delete(self._keys.replies(web))
            forgotten.append(web)
        return forgotten

    def reconcile_slots(self, tenants: Iterable[str], models: Iterable[str]) -> int:
        """Free concurrency slots whose request has ended, or never came into any of these queues; how many.

        Their tokens are not given back: nobody knows any more how many were used.
        """
        queues = [FleetQueue(self._keys, model) for model in models]
        before_s = self._clock() - GRACE_S
        num_freed = 0
        for tenant in tenants:
            slots = execute(self._client, self._limits.slots(tenant, before_s))
            dead = [id_ for id_ in slots if self._is_over(queues, id_, before_s)]
            execute_many(self._client, [self._limits.settle(tenant, id_, refund_tokens=0) for id_ in dead])
            num_freed += len(dead)
        return num_freed

    def _is_over(self, queues: Sequence[FleetQueue], request_id: str, before_s: float) -> bool:
        ends = [execute(self._client, queue.ended_s(request_id)) for queue in queues]
        return all(end is not None and end < before_s for end in ends)
