"""Claims requests from the fleet queue ahead of the loop, for no more room than the planner has or can make."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import redis

from inference.shedding import end_dropped
from inference.worker.active import ActiveRequest
from inference.worker.inbox import Inbox
from inference.worker.lease import Lease
from scheduling import store
from scheduling.core.answers import Claimed, ClaimedRequest
from scheduling.core.room import NO_ROOM, URGENT_PERIOD_S, Room, UrgentRoom
from scheduling.fleet import FleetQueue

logger = logging.getLogger(__name__)

BELL_WAIT_S = 0.25
"""An idle engine process tries to claim this often though no bell rings; also the time that `close` may take."""
EXPIRE_PERIOD_S = 1.0
"""How often an idle engine process looks for leases that ran out."""
LOOK_PERIOD_S = 0.25
"""How often one that may claim nothing looks how many wait."""
NO_LIMIT = 2**31 - 1


class Intake(threading.Thread):
    """A thread that claims while the loop computes. The loop calls `offer` and `take`."""

    def __init__(
        self,
        client: redis.Redis,
        queue: FleetQueue,
        bell: str,
        lease: Lease,
        *,
        read: Callable[[ClaimedRequest, str], ActiveRequest],
        inbox: Inbox,
    ) -> None:
        """`read` turns what an owner claimed into an active request; the inbox wakes the loop to take it."""
        super().__init__(name="intake", daemon=True)
        self._client = client
        self._queue = queue
        self._bell = bell
        self._lease = lease
        self._read = read
        self._inbox = inbox
        self._number = 0
        self._expired_s = 0.0
        self._changed = threading.Condition()
        self._room = NO_ROOM
        self._urgent: UrgentRoom | None = None
        self._is_idle = False
        self._is_claiming = False
        self._claimed: deque[ActiveRequest] = deque()
        self._closing = False
        self._looked_s = 0.0
        self.policy = ""
        self.revision = 0
        self.depth = 0
        """Requests that waited when the queue was looked at last."""

    def offer(self, room: Room, *, is_idle: bool, urgent: UrgentRoom | None = None) -> None:
        """Say what may be claimed from now on, in place of what was offered before.

        `room` does not know of what is claimed and not yet taken; that is subtracted here. With `is_idle` nothing runs,
        and a prompt that does not fit the room never will: it is claimed, to be refused. `urgent`: what may be claimed
        where that gives nothing, to take the place of something that runs.
        """
        self._urgent = urgent
        if room == self._room and is_idle == self._is_idle:
            return
        with self._changed:
            self._room = room
            self._is_idle = is_idle
            self._changed.notify_all()

    def shut(self, timeout_s: float) -> None:
        """Offer nothing, and wait for a claim that is on its way, so that whoever hears of it can rely on it."""
        with self._changed:
            self._room, self._is_idle, self._urgent = NO_ROOM, False, None
            self._changed.wait_for(lambda: not self._is_claiming, timeout_s)

    @property
    def is_shut(self) -> bool:
        """Whether nothing was claimed that was not taken, nor can be by a claim on its way."""
        with self._changed:
            return not (self._claimed or self._is_claiming)

    def take(self) -> list[ActiveRequest]:
        """What was claimed since the last call; it has used up its room until the next `offer`."""
        if not self._claimed:
            return []
        with self._changed:
            self._room, self._is_idle, self._urgent = self._left(), False, None
            taken = list(self._claimed)
            self._claimed.clear()
            return taken

    def run(self) -> None:
        """Claim whenever there is room; between claims wait for the bell, or for room that fits the head."""
        while (room := self._await_room()) is not None:
            try:
                claimed = self._claim(room)
                self._rest()
                if claimed.requests or claimed.more or not room.requests:
                    continue
                if claimed.depth == 0:
                    self._listen()
                else:
                    self._await_change(room)
            except redis.RedisError as error:
                self._rest()
                logger.warning("No requests can be claimed: %s", error)
                self._await_change(room)

    def close(self) -> None:
        """End the thread; what was claimed stays for `take`, or for release."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.join()

    def _await_room(self) -> Room | None:
        """Room to claim for; none, where it is time to look at the queue all the same. None when closed."""
        with self._changed:
            while not self._closing and self._left().requests <= 0:
                looked_s = time.monotonic() - self._looked_s
                left_s = (URGENT_PERIOD_S if self._left_urgent() else LOOK_PERIOD_S) - looked_s
                if left_s <= 0:
                    break
                # Of urgent room that is offered meanwhile nobody tells. Changes of the room put off no look.
                self._changed.wait(min(left_s, URGENT_PERIOD_S))
            self._is_claiming = not self._closing
            return None if self._closing else self._left()

    def _rest(self) -> None:
        with self._changed:
            self._is_claiming = False
            self._changed.notify_all()

    def _await_change(self, room: Room) -> None:
        """Until the room is another; or a while, since the head of the queue may be another."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._left() != room, timeout=BELL_WAIT_S)

    def _left(self) -> Room:
        """The offered room without what is claimed for it already."""
        if not self._claimed:
            return self._room
        tokens = self._room.tokens - sum(len(active.sequence.tokens) for active in self._claimed)
        return Room(self._room.requests - len(self._claimed), max(0, tokens))

    def _left_urgent(self) -> UrgentRoom | None:
        """One at a time: the planner says what the next may have when it has seen this one."""
        return None if self._claimed else self._urgent

    def _claim(self, room: Room) -> Claimed:
        """Claim for the room; an idle engine also claims a head of the queue that no room will ever fit.

        Where that gives nothing, claim one that may take the place of another. Without any room (a paused engine has
        none) this still tells how many wait, and by which policy. Requests that were dropped for their deadline are
        ended here.
        """
        owner, urgent = self._lease.owner, self._left_urgent()
        claims: list[Claimed] = []
        if room.requests > 0 or urgent is None:
            claims.append(self._claim_as(owner, room))
            if room.requests > 0 and self._gave_nothing(claims) and self._is_idle and not self._claimed:
                claims.append(self._claim_as(owner, Room(1, NO_LIMIT)))
        is_urgent = urgent is not None and self._gave_nothing(claims)
        if urgent is not None and is_urgent:
            claims.append(self._claim_as(owner, Room(1, urgent.tokens), urgent.max_priority))
        claimed = claims[-1]
        self._looked_s = time.monotonic()
        self.policy, self.revision, self.depth = claimed.policy, claimed.revision, claimed.depth
        if claimed.requests:
            opened = [self._read(request, owner) for request in claimed.requests]
            for active in opened:
                active.sequence.is_urgent = is_urgent
            with self._changed:
                self._claimed.extend(opened)
            self._inbox.wake()
        end_dropped(self._client, self._queue, [drop for claim in claims for drop in claim.dropped])
        return claimed

    def _gave_nothing(self, claims: list[Claimed]) -> bool:
        """Whether another kind of claim might give something: requests wait, and this one did not reach its bound."""
        return not claims or (not (claims[-1].requests or claims[-1].more) and claims[-1].depth > 0)

    def _claim_as(self, owner: str, room: Room, max_priority: int | None = None) -> Claimed:
        """One claim, repeated under its number where the reply was lost, so that no request hangs on our lease."""
        self._number += 1
        command = self._queue.claim(
            owner,
            max_requests=max(0, room.requests),
            max_tokens=room.tokens,
            lease_s=self._lease.lease_s,
            number=self._number,
            max_priority=max_priority,
        )
        while True:
            try:
                claimed = store.execute(self._client, command)
                self._lease.note_claim(owner)
                return claimed
            except (redis.ConnectionError, redis.TimeoutError) as error:
                logger.warning("The reply to a claim was lost, it is repeated: %s", error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=BELL_WAIT_S)
                    if self._closing or self._lease.owner != owner:
                        raise

    def _listen(self) -> None:
        """Wait for the bell. One heard without room to claim is rung again, for another engine process."""
        if self._client.blpop([self._bell], timeout=BELL_WAIT_S) is None:
            self._expire()
        elif self._left().requests <= 0:
            self._client.rpush(self._bell, 1)

    def _expire(self) -> None:
        now = time.monotonic()
        if now - self._expired_s >= EXPIRE_PERIOD_S:
            self._expired_s = now
            store.execute(self._client, self._queue.expire())
