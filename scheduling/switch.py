"""Switching the policy of a live queue: a new order is built beside the old one, then put in force by one short script.

While it is built (in chunks of a few ms, smaller where the server is slow, in keys of a new epoch) claims and enqueues
go on in the old epoch, and every request that comes, goes or moves is listed; the list is worked off until little is
left. The last script deals with that rest: what left is taken out, what came is marked unplaced and placed right after.
A lock that runs out fences the switcher: one that died blocks nobody, one that was slow finds its lock lost before it
can do harm.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import redis

from scheduling.core.policies import Policy, build_policy
from scheduling.fleet import FleetQueue, pack_rules, unpack_entry
from scheduling.store import Command, Sent, execute, load_scripts

LOCK_MS = 5_000
CHUNK, MIN_CHUNK = 500, 60
"""Requests of one step at most, and where the server is slow: nobody is claimed while a step runs."""
STEP_S = 0.01
"""A step that takes longer is followed by one of half the size, one that takes a quarter of it by a larger one."""
REST = 200
"""Changes that the last script may find left over: about 1 ms."""

SCRIPTS = ("switch_begin", "switch_build", "switch_flip", "switch_end", "unplaced", "place")
"""Loaded before the first step: in the midst of it one was seen to hold the server up for 20 to 90 ms, and all claims
with it."""

_pack = msgspec.msgpack.Encoder().encode

Weights = Callable[[], Mapping[str, float]]
"""Tenants' weights as they are now; those it does not know keep the one that their requests came with."""


class SwitchError(Exception):
    """The policy was not switched; the one before stays in force."""


class SwitchInProgress(SwitchError):  # noqa: N818
    """Another switch of this queue is under way; try again when it is done (5 s at most if its process died)."""


class StaleRevision(SwitchError):  # noqa: N818
    """A policy of this or a later revision is active already."""


class SwitchLost(SwitchError):  # noqa: N818
    """The switch stood still for so long that its lock ran out."""


@dataclass(frozen=True, slots=True)
class SwitchResult:
    """How many requests waited in the new order when it came into force, and how long all took."""

    moved: int
    seconds: float


def switch_policy(
    client: redis.Redis,
    queue: FleetQueue,
    policy: Policy,
    revision: int,
    clock: Callable[[], float] = time.perf_counter,
    weights: Weights = dict,
) -> SwitchResult:
    """Put `policy` in force under `revision`, which must be above the active one. Loses, doubles and pauses nothing.

    What waits is placed by the weight that its tenant has now, where `weights` tells it.
    Repeating a switch that came into force (its caller died before it knew) does nothing and succeeds. Raises
    SwitchInProgress, StaleRevision or SwitchLost, the queue being as before.
    """
    start = clock()
    load_scripts(client, SCRIPTS)
    build = _Build(client, queue, policy, uuid.uuid4().hex, clock, weights())
    if not build.begin(revision):
        return SwitchResult(0, clock() - start)
    try:
        build.fill()
        moved = build.flip(revision)
    finally:
        build.end()
    place_unplaced(client, queue, weights)
    return SwitchResult(moved, clock() - start)


def place_unplaced(client: redis.Redis, queue: FleetQueue, weights: Weights = dict) -> int:
    """Place what waits unplaced, under the policy in force. Anybody may call it at any time, also several at once."""
    placed = 0
    while True:
        active, entries = execute(client, queue.unplaced())
        if not entries:
            return placed
        policy, now = build_policy(active.name, active.params), weights()
        rows = [(entry.id, policy.place(entry.at_weight(now))) for entry in entries]
        placed += execute(client, queue.place(rows, revision=active.revision))


class _Read(NamedTuple):
    """What a step read: rows (id, packed entry or b"" if gone), where to read on, and how many changes are listed."""

    rows: list[tuple[bytes, bytes]]
    position: int
    changes: int


def _read_step(reply: Any) -> _Read:
    if reply[0] == 0:
        raise SwitchLost(SwitchLost.__doc__)
    _, words, position, changes = reply
    return _Read(list(zip(words[::2], words[1::2], strict=True)), position, changes)


class _Build:
    """An epoch while it is built."""

    def __init__(
        self,
        client: redis.Redis,
        queue: FleetQueue,
        policy: Policy,
        token: str,
        clock: Callable[[], float] = time.perf_counter,
        weights_now: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.client = client
        self.queue = queue
        self.policy = policy
        self.token = token
        self.clock = clock
        self.weights_now = weights_now
        """Tenant -> its weight."""
        self.chunk = CHUNK
        self.epoch = 0
        self.read = 0
        """How much of the list of changes was worked off."""
        self.weights: dict[str, tuple[int, float]] = {}
        """Flow -> arrival number and weight of its latest request, whose weight counts."""

    def begin(self, revision: int) -> bool:
        """Take the lock and an epoch. False where this very policy and revision are in force already."""
        refusal, number = execute(self.client, self._script("switch_begin", revision, LOCK_MS))
        if refusal == b"busy":
            raise SwitchInProgress(SwitchInProgress.__doc__)
        if refusal == b"revision":
            active = execute(self.client, self.queue.active_policy())
            if (active.revision, active.name, active.params) == (revision, self.policy.name, dict(self.policy.params)):
                return False
            raise StaleRevision(f"Revision {number} is active; a switch to {revision} comes too late.")
        self.epoch = number
        return True

    def fill(self) -> None:
        """Place all that waits, in chunks: each is placed here while the server stores the last and reads the next."""
        placed = self._place(())
        rows, position, changes = self._step(placed, "scan", -1)
        while position:
            sent_s = self.clock()
            with Sent(self.client, self._command(placed, "scan", position, known=changes)) as step:
                placed = self._place(rows)
                rows, position, changes = step.result()
            self._size_chunk(self.clock() - sent_s)
        for last in (placed, self._place(rows)):
            self._step(last, "changes", self.read, limit=0)

    def flip(self, revision: int) -> int:
        """Work off the changes and put the new epoch in force; how many wait in it."""
        params = json.dumps(dict(self.policy.params), sort_keys=True)
        while True:
            self._catch_up()
            args = (self.epoch, revision, self.policy.name, params, self.read, REST, pack_rules(self.policy.rules))
            reply = execute(self.client, self._script("switch_flip", *args))
            if reply[0] == 0:
                raise SwitchLost(SwitchLost.__doc__)
            if reply[0] == 1:
                return int(reply[1])

    def end(self) -> None:
        """Let go of the lock, delete epochs that are over."""
        while execute(self.client, self._script("switch_end")) > 0:
            pass

    def _catch_up(self) -> None:
        rows, self.read, changes = self._step(self._place(()), "changes", self.read)
        while rows:
            rows, self.read, changes = self._step(self._place(rows), "changes", self.read)
            if len(rows) + changes - self.read < REST // 4:
                self._step(self._place(rows), "changes", self.read, limit=0)
                return

    def _size_chunk(self, step_s: float) -> None:
        if step_s > STEP_S:
            self.chunk = max(MIN_CHUNK, self.chunk // 2)
        elif step_s < STEP_S / 4:
            self.chunk = min(CHUNK, self.chunk * 2)

    def _place(self, rows: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Rows (id, packed entry or b"" if gone) as the script takes them: what to take out, and what to put where."""
        flows: dict[str, list[Any]] = {}
        gone: list[str] = []
        places: list[str] = []
        for id_, packed in rows:
            if not packed:
                gone.append(id_.decode())
                continue
            entry, number = unpack_entry(packed)
            flow, weight, rank = self.policy.place(entry.at_weight(self.weights_now))
            digits = f"{number:016d}"
            places += (entry.id, digits + flow)
            members = flows.get(flow)
            if members is None:
                members = flows[flow] = []
            members += (repr(rank), f"{digits}:{entry.id}")
            if number > self.weights.get(flow, (0, 0.0))[0]:
                self.weights[flow] = (number, weight)
        return _pack((gone, places, [(flow, repr(self.weights[flow][1]), members) for flow, members in flows.items()]))

    def _step(self, placed: bytes, source: str, position: int, *, limit: int | None = None, known: int = 0) -> _Read:
        """Put what was placed into the new epoch and take out what is gone; read the next rows (None: a chunk).

        `known`: how many changes the last scan answered. Repeating a step does no harm.
        """
        return execute(self.client, self._command(placed, source, position, limit=limit, known=known))

    def _command(
        self, placed: bytes, source: str, position: int, *, limit: int | None = None, known: int = 0
    ) -> Command[_Read]:
        args = (self.token, LOCK_MS, self.epoch, source, position, self.chunk if limit is None else limit, known)
        return self.queue.script("switch_build", _read_step, *args, placed)

    def _script(self, name: str, *args: Any) -> Command[Any]:
        return self.queue.script(name, lambda reply: reply, self.token, *args)
