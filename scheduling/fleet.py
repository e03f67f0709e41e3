"""The fleet queue of one model, in Redis. Sans-IO: every method returns a Command; docs/protocol.md tells the story.

Every operation is one Lua script, so it happens as a whole or not at all; scripts read Redis's TIME unless `now` is
given. All are safe to repeat after a lost reply: a second enqueue answers `duplicate`, a second finish False, a claim
repeated under its `number` gives the same requests, a cancel repeated under its token the same answer, a journal append
is placed by its offset, and cancels are told until obeyed.
"""

import json
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from scheduling.core.answers import (
    TOTALS,
    ActivePolicy,
    Cancelled,
    Claimed,
    ClaimedRequest,
    DropReason,
    Enqueued,
    Position,
    QueueSnapshot,
    RequestRecordView,
    Shed,
)
from scheduling.core.policies import build_policy
from scheduling.core.request import Placement, QueueEntry
from scheduling.core.rules import MAX_EXPIRED, PLAIN, QueueRules
from scheduling.keys import Keys
from scheduling.store import Command, load_script

__all__ = [
    "ActivePolicy",
    "Cancelled",
    "Claimed",
    "ClaimedRequest",
    "Enqueued",
    "FleetQueue",
    "Position",
    "QueueSnapshot",
    "RequestRecordView",
    "Shed",
]

T = TypeVar("T")
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode


class FleetQueue:
    """Commands on one model's queue."""

    def __init__(self, keys: Keys, model: str) -> None:
        self.keys = keys
        self.model = model
        self.base = keys.queue(model)

    def script(self, name: str, read: Callable[[Any], T], *args: Any) -> Command[T]:
        """A call of `lua/<name>.lua` on this queue; None goes as an empty string."""
        words = ["" if arg is None else arg for arg in args]
        return Command((self.base, *words), read, load_script(name), 1)

    def enqueue(
        self,
        entry: QueueEntry,
        placement: Placement,
        *,
        revision: int,
        body: bytes,
        depth_limit: int,
        reply_to: str = "",
        keep_s: int = 60,
        tokens_limit: int | None = None,
        shed: bool = False,
    ) -> Command[Enqueued]:
        """Add a request, placed by the policy of `revision`, unless the queue is full; wake an idle engine.

        Full: `depth_limit` or more wait, or with it more than `tokens_limit` tokens would (unless nothing else waits).
        With `shed`, then waiting requests of lower priority go instead, the lowest and latest first, if as few as
        MAX_SHED of them make room; never one that was claimed before. The caller ends them, see `end_shed`.
        """
        place = (placement.flow, placement.weight, placement.rank)
        packed = _pack((pack_entry(entry, reply_to, keep_s), place))
        return self.script(
            "enqueue", _read_enqueued, entry.id, packed, revision, depth_limit, body, tokens_limit, "1" if shed else ""
        )

    def claim(
        self,
        owner: str,
        *,
        max_requests: int,
        max_tokens: int,
        lease_s: float,
        now: float | None = None,
        number: int | None = None,
        max_priority: int | None = None,
    ) -> Command[Claimed]:
        """Give `owner` the next requests and renew its lease.

        In strict order: stops at the first request whose prompt and journal do not fit what is left of `max_tokens`.
        `number`, raised by one for each new claim of an owner, makes a repeated call (a lost reply, redis-py's own
        retry) answer with what the first one claimed and is still held; without it such requests would hang on a live
        lease.

        First drops waiting requests whose deadline has passed, where they ask for that (`drop_expired` of their entry)
        and were never claimed before; while there are more than MAX_EXPIRED of them it serves nobody.

        With `max_priority` it is for requests that take the slot of a lower one: stops at the first of a higher number,
        and serves nobody under a policy by which no level outranks another (`QueueRules.preempts`).
        """
        args = (owner, max_requests, max_tokens, repr(lease_s), _time(now), number, max_priority)
        return self.script("claim", _read_claimed, *args)

    def drop_expired(self, now: float | None = None, limit: int = MAX_EXPIRED) -> Command[list[Shed]]:
        """What a claim drops for its deadline, also where nobody claims."""
        return self.script("drop_expired", _read_expired_requests, _time(now), limit)

    def journal(self, owner: str, appends: Sequence[tuple[str, int, int, bytes]]) -> Command[list[str]]:
        """Append output tokens: (request id, attempt, number of the first token, little-endian int32s).

        Answers the ids that this owner and attempt no longer hold. Tokens that the journal has are skipped by number; a
        gap (Redis came back with an older state) sends the request back to the queue and names it as no longer held.
        """
        words = [word for append in appends for word in append]
        return self.script("journal", _read_ids, owner, *words)

    def finish(
        self,
        owner: str,
        request_id: str,
        attempt: int,
        *,
        state: str,
        used_tokens: int,
        finish: bytes,
        output: str,
        prompt_tokens: int | None = None,
    ) -> Command[bool]:
        """End a request: give up its lease, correct its flow by the tokens really used, keep its record a while.

        `prompt_tokens` of those used are the prompt's; None: as many as were said when it came. False where `owner` and
        `attempt` no longer hold it.
        """
        return self.script(
            "finish", bool, owner, request_id, attempt, state, used_tokens, finish, output, prompt_tokens
        )

    def cancel(self, request_id: str, token: str = "") -> Command[Cancelled]:
        """Take a waiting request out of the queue, or tell a running one's owner to stop it.

        The call that took it out gets the same answer again (a lost reply); another `token`, by default one of its own
        for each command, is another call, and is told that the request is gone.
        """
        return self.script("cancel", _read_cancelled, request_id, token or uuid.uuid4().hex)

    def end_shed(self, request_id: str, finish: bytes) -> Command[bool]:
        """Write down how a dropped request ended. True for the one caller who now ends it towards client and tenant."""
        return self.script("end_shed", bool, request_id, finish)

    def shed_before(self, before_s: float, limit: int = 100) -> Command[list[str]]:
        """Requests dropped before then (unix seconds) that nobody has ended: who was to do it died, say."""
        return Command(("ZRANGEBYSCORE", f"{self.base}:shed", "-inf", before_s, "LIMIT", 0, limit), _read_ids)

    def renew(self, owner: str, lease_s: float, now: float | None = None) -> Command[bool]:
        """Move the lease's end to `lease_s` from now. False: it had been lost (or `owner` has not claimed yet).

        An owner that comes back after its lease ended, by this or by a claim, was not ended by what it ran: the
        failures that `expire` counted for it are taken back.
        """
        return self.script("renew", bool, owner, repr(lease_s), _time(now))

    def end_lease(self, owner: str, within_s: float, now: float | None = None) -> Command[bool]:
        """Move the end of a lease to `within_s` from now, unless it is sooner: its process has ended.

        Then `expire` does the rest. False: there is no such lease.
        """
        return self.script("end_lease", bool, owner, repr(within_s), _time(now))

    def release(self, owner: str, attempts: Mapping[str, int] | None = None, *, failed: bool = False) -> Command[int]:
        """Put requests (None: all that `owner` holds) back at their old rank. Answers how many.

        `attempts` says of each id which attempt is given back: where `owner` has claimed it anew meanwhile, a repeated
        call (a lost reply) leaves it alone. `failed` counts it as a failure of each, as the end of a lease does.
        """
        words = [word for given in (attempts or {}).items() for word in given]
        return self.script("release", int, owner, "all" if attempts is None else "some", int(failed), *words)

    def expire(self, now: float | None = None) -> Command[list[tuple[str, int]]]:
        """Put back the requests of owners whose lease ended: (owner, how many). It counts as a failure of each.

        Requests claimed before the last policy switch become `unplaced`; see there.
        """
        return self.script("expire", _read_expired, _time(now))

    def take_cancels(self, owner: str) -> Command[list[str]]:
        """Ids that `owner` should stop; each is repeated until the owner has finished it: no lost reply loses one."""
        return Command(("LRANGE", self.keys.cancels(self.model, owner), 0, -1), _read_ids)

    def snapshot(self) -> Command[QueueSnapshot]:
        """Counts for dashboards and admission; cost grows with the number of tenants waiting, not of requests."""
        return self.script("snapshot", _read_snapshot)

    def record(self, request_id: str) -> Command[RequestRecordView | None]:
        """A request's record, or None once it is forgotten."""
        return self.script("record", _read_record, request_id)

    def is_cancelling(self, request_id: str) -> Command[bool]:
        """Whether a running request was cancelled and its owner has not ended it yet."""
        return Command(("HEXISTS", self.keys.request(self.model, request_id), "cancel"), bool)

    def ended_s(self, request_id: str) -> Command[float | None]:
        """When a request ended (unix seconds), 0 for one no longer (or not yet) known, None while it waits or runs."""
        key = self.keys.request(self.model, request_id)
        return Command(("HMGET", key, "state", "ended"), _read_ended)

    def tokens(self, request_id: str) -> Command[list[int]]:
        """A request's output tokens so far."""
        return Command(("GET", self.keys.tokens(self.model, request_id)), _read_tokens)

    def position(self, request_id: str, now: float | None = None) -> Command[Position | None]:
        """How many go before a waiting request; None where it does not wait."""
        return self.script("position", _read_position, request_id, _time(now))

    def active_policy(self) -> Command[ActivePolicy]:
        """The policy in force; fifo at revision 0 in a queue where none was set."""
        return Command(("HMGET", f"{self.base}:meta", "revision", "policy", "params"), _read_policy)

    def init_policy(self, name: str, params: Mapping[str, Any], revision: int) -> Command[bool]:
        """Make a policy active in a queue that has none and where nothing waits; False elsewhere (then switch)."""
        rules = pack_rules(build_policy(name, params).rules)
        return self.script("init_policy", bool, name, json.dumps(dict(params), sort_keys=True), revision, rules)

    def set_weight(self, flow: str, weight: float) -> Command[bool]:
        """Change the weight of a flow with waiting requests; False without any (the next enqueue brings its own)."""
        return self.script("set_weight", bool, flow, repr(float(weight)))

    def reply_to_requests(self, web: str) -> Command[list[str]]:
        """Ids of waiting and running requests whose answers a web process streams."""
        return Command(("SMEMBERS", f"{self.base}:web:{web}"), _read_ids)

    def unplaced(self, limit: int = 500) -> Command[tuple[ActivePolicy, list[QueueEntry]]]:
        """Waiting requests that the active policy has not placed yet, and that policy.

        They come from a switch: scripts cannot run a policy. Place them with `place`; reading them removes nothing, so
        a caller that dies in between loses nothing.
        """
        return self.script("unplaced", _read_unplaced, limit)

    def sample(self, limit: int) -> Command[list[QueueEntry]]:
        """Up to `limit` waiting requests, drawn at random."""
        return self.script("sample", _read_entries, limit)

    def place(self, placed: Sequence[tuple[str, Placement]], *, revision: int) -> Command[int]:
        """Put unplaced requests into their flows; how many were. None are where another revision is active by now."""
        rows = [(id_, place.flow, place.weight, place.rank) for id_, place in placed]
        return self.script("place", int, revision, _pack(rows))


def pack_rules(rules: QueueRules) -> bytes:
    """Rules as scripts store them; nothing where they are plain."""
    if rules == PLAIN:
        return b""
    limits = [False if limit is None else limit for limit in (rules.promote_after_s, rules.late_slack_s)]
    prices = (rules.request_price, rules.prompt_price, rules.output_price)
    return _pack((*limits, *prices, rules.run, rules.preempts))


def pack_entry(entry: QueueEntry, reply_to: str, keep_s: int) -> tuple[Any, ...]:
    """An entry as scripts store it; a script appends the arrival number. No nil: a Lua list ends at its first hole."""
    deadline = False if entry.deadline_s is None else entry.deadline_s
    head = (entry.id, entry.tenant, entry.priority, entry.arrival_s, entry.prompt_tokens, entry.max_tokens)
    return (*head, deadline, entry.share, reply_to, keep_s, entry.drop_expired)


def unpack_entry(packed: bytes) -> tuple[QueueEntry, int]:
    """An entry as scripts store it, and its arrival number. Lua writes whole floats as integers."""
    id_, tenant, priority, arrival_s, prompt, maximum, deadline, share, _, _, expires, number = _unpack(packed)
    entry = QueueEntry(
        id=id_,
        tenant=tenant,
        priority=priority,
        arrival_s=float(arrival_s),
        prompt_tokens=prompt,
        max_tokens=maximum,
        deadline_s=None if deadline is False else float(deadline),
        share=float(share),
        drop_expired=expires,
    )
    return entry, number


def read_tokens(journal: bytes | None) -> list[int]:
    """Token ids from their journal: little-endian int32."""
    return list(struct.unpack(f"<{len(journal) // 4}i", journal)) if journal else []


def _time(now: float | None) -> str:
    return "" if now is None else repr(float(now))


_read_tokens = read_tokens


def _read_enqueued(reply: list[Any]) -> Enqueued:
    status, depth, revision, shed, *waiting_tokens = reply
    return Enqueued(status.decode(), depth, revision, _read_dropped(shed, "shed"), *waiting_tokens)


def _read_dropped(flat: list[bytes], reason: DropReason) -> tuple[Shed, ...]:
    return tuple([Shed(id_.decode(), body, reason) for id_, body in zip(flat[::2], flat[1::2], strict=True)])


def _read_expired_requests(reply: list[bytes]) -> list[Shed]:
    return list(_read_dropped(reply, "deadline_exceeded"))


def _read_claimed(reply: list[Any]) -> Claimed:
    revision, policy, depth, rows, dropped, more = reply
    requests = [ClaimedRequest(row[0].decode(), row[1], row[2], read_tokens(row[3]), row[4]) for row in rows]
    return Claimed(revision, policy.decode(), requests, depth, _read_dropped(dropped, "deadline_exceeded"), bool(more))


def _read_ids(reply: Iterable[bytes]) -> list[str]:
    return [id_.decode() for id_ in reply]


def _read_cancelled(reply: list[Any]) -> Cancelled:
    return Cancelled(reply[0].decode(), reply[1] or None, reply[2].decode())


def _read_expired(reply: list[Any]) -> list[tuple[str, int]]:
    return [(owner.decode(), num) for owner, num in reply]


def _read_policy(reply: list[Any]) -> ActivePolicy:
    revision, name, params = reply
    return ActivePolicy(int(revision or 0), (name or b"fifo").decode(), json.loads(params) if params else {})


def _read_entries(reply: list[bytes]) -> list[QueueEntry]:
    return [unpack_entry(packed)[0] for packed in reply]


def _read_unplaced(reply: list[Any]) -> tuple[ActivePolicy, list[QueueEntry]]:
    return _read_policy(reply[0]), _read_entries(reply[1])


def _read_record(reply: list[Any] | None) -> RequestRecordView | None:
    if reply is None:
        return None
    state, attempt, output, finish, body, num_bytes, dropped = reply
    end = finish or None
    return RequestRecordView(
        state.decode(), int(attempt), output.decode(), end, num_bytes // 4, body, dropped.decode() or None
    )


def _read_ended(reply: list[Any]) -> float | None:
    state, ended = reply
    return None if state in (b"queued", b"running") else float(ended or 0)


def _read_position(reply: list[Any] | None) -> Position | None:
    return None if reply is None else Position(reply[0].decode(), reply[1], reply[2])


def _read_snapshot(reply: list[Any]) -> QueueSnapshot:
    fields, oldest = _pairs(reply[0]), reply[1]
    policy = _read_policy([fields.get(b"revision"), fields.get(b"policy"), fields.get(b"params")])
    totals = {f"{name}_total": int(fields.get(name.encode(), 0)) for name in TOTALS}
    return QueueSnapshot(
        depth=int(fields.get(b"depth", 0)),
        waiting_tokens=int(fields.get(b"waiting_tokens", 0)),
        by_priority={int(level): num for level, num in _counts(fields, b"p:")},
        by_tenant={tenant.decode(): num for tenant, num in _counts(fields, b"t:")},
        running=int(fields.get(b"running", 0)),
        oldest_arrival_s=float(oldest[1]) if oldest else None,
        revision=policy.revision,
        policy=policy.name,
        params=policy.params,
        **totals,
    )


def _counts(fields: dict[bytes, bytes], prefix: bytes) -> list[tuple[bytes, int]]:
    return sorted((name[len(prefix) :], int(num)) for name, num in fields.items() if name.startswith(prefix))


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
