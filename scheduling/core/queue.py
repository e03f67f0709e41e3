"""The queue in memory: the operations and answers of the one in Redis, for simulation and as its reference in tests."""

import math
import struct
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

from scheduling.core.answers import (
    ActivePolicy,
    Cancelled,
    Claimed,
    ClaimedRequest,
    Enqueued,
    Position,
    QueueSnapshot,
    RequestRecordView,
    Shed,
)
from scheduling.core.flows import Flows
from scheduling.core.policies import Policy, build_policy
from scheduling.core.request import Placement, QueueEntry
from scheduling.core.rules import LATE, MAX_DEMOTIONS, MAX_SHED, PLAIN, PRIORITY_STEP, QueueRules


@dataclass(slots=True)
class _Lease:
    owner: str
    flow: str
    weight: float
    rank: float
    epoch: int


@dataclass(slots=True)
class _Record:
    entry: QueueEntry
    number: int
    body: bytes
    reply_to: str
    keep_s: int
    state: str = "queued"
    attempt: int = 0
    failures: int = 0
    output: str = ""
    finish: bytes | None = None
    journal: bytearray = field(default_factory=bytearray)
    lease: _Lease | None = None
    cancelled: bool = False


@dataclass(slots=True)
class _Owner:
    expires_s: float
    held: dict[str, _Record] = field(default_factory=dict)
    cancels: list[str] = field(default_factory=list)
    number: int | None = None
    """Of the last claim, and what that gave."""
    given: list[tuple[str, int]] = field(default_factory=list)


class FlowQueue:
    """One model's queue. Methods are those of `FleetQueue`, whose docstrings hold here; results come directly."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._flows = Flows()
        self._epoch = 0
        self._policy: ActivePolicy | None = None
        self._rules: QueueRules = PLAIN
        self._reorders = self._promotes = False
        self._arrivals: list[tuple[float, str]] = []
        """A heap of (arrival, id), kept while the rules promote; who waits no more is dropped when it comes up."""
        self._records: dict[str, _Record] = {}
        self._waiting: dict[str, _Record] = {}
        self._unplaced: dict[str, _Record] = {}
        self._owners: dict[str, _Owner] = {}
        self._ended: list[tuple[float, str]] = []
        """A heap of (when a record is forgotten, id)."""
        self._by_priority: Counter[int] = Counter()
        self._by_tenant: Counter[str] = Counter()
        self._waiting_tokens = 0
        self._right: list[tuple[float, str]] | None = None
        """(Priority and arrival, id) in order, from the first time that anybody is to be shed; may name the gone."""
        self._shed_at: dict[str, float] = {}
        self._totals: Counter[str] = Counter()

    def enqueue(
        self,
        entry: QueueEntry,
        placement: Placement,
        *,
        revision: int,
        body: bytes = b"",
        depth_limit: int,
        reply_to: str = "",
        keep_s: int = 60,
        tokens_limit: int | None = None,
        shed: bool = False,
    ) -> Enqueued:
        if self._ended:
            self._forget()
        depth, active = len(self._waiting), self._policy.revision if self._policy else 0
        if entry.id in self._records:
            return Enqueued("duplicate", depth, active)
        if revision != active:
            return Enqueued("stale", depth, active)
        dropped: tuple[Shed, ...] = ()
        if depth >= depth_limit or tokens_limit is not None:
            victims = self._find_victims(entry, depth_limit, math.inf if tokens_limit is None else tokens_limit, shed)
            if victims is None:
                return Enqueued("full", depth, active)
            dropped = tuple(self._shed(victim) for victim in victims)
        self._totals["enqueued"] += 1
        record = _Record(entry, self._totals["enqueued"], body, reply_to, keep_s)
        self._records[entry.id] = record
        self._start_waiting(record)
        self._flows.place(entry.id, record.number, placement)
        if self._right is not None:
            insort(self._right, (_right(entry), entry.id))
        return Enqueued("queued", depth + 1 - len(dropped), active, dropped)

    def claim(
        self,
        owner: str,
        *,
        max_requests: int,
        max_tokens: int,
        lease_s: float,
        now: float | None = None,
        number: int | None = None,
    ) -> Claimed:
        state = self._owners.setdefault(owner, _Owner(0.0))
        state.expires_s = self._now(now) + lease_s
        if number is not None and state.number == number:
            rows = [(id_, attempt) for id_, attempt in state.given if self._holds(owner, id_, attempt)]
        else:
            rows = self._serve(owner, state, max_requests, max_tokens, self._now(now))
            if number is not None:
                state.number, state.given = number, rows
        requests = [
            ClaimedRequest(id_, (record := self._records[id_]).body, attempt, _tokens(record.journal), record.failures)
            for id_, attempt in rows
        ]
        active = self.active_policy()
        return Claimed(active.revision, active.name, requests, len(self._waiting))

    def journal(self, owner: str, appends: Sequence[tuple[str, int, int, bytes]]) -> list[str]:
        lost = []
        for id_, attempt, start, packed in appends:
            if not self._holds(owner, id_, attempt):
                lost.append(id_)
                continue
            record = self._records[id_]
            if len(record.journal) < 4 * start:
                self._requeue(record)
                lost.append(id_)
            else:
                record.journal[4 * start : 4 * start + len(packed)] = packed
        return lost

    def finish(
        self, owner: str, request_id: str, attempt: int, *, state: str, used_tokens: int, finish: bytes, output: str
    ) -> bool:
        if not self._holds(owner, request_id, attempt):
            return False
        record = self._records[request_id]
        lease = self._stop_running(record)
        if lease.epoch == self._epoch:
            entry, rules = record.entry, self._rules
            real = rules.charge_used(entry.prompt_tokens, used_tokens)
            self._flows.correct(lease.flow, (real - self._charge(entry)) / lease.weight)
        record.state, record.finish, record.output, record.cancelled = state, finish, output, False
        self._totals["finished"] += 1
        self._totals["finished_tokens"] += used_tokens
        self._forget_later(record)
        return True

    def cancel(self, request_id: str) -> Cancelled:
        record = self._waiting.get(request_id)
        if record is not None:
            if not self._flows.remove(request_id):
                self._unplaced.pop(request_id, None)
            self._stop_waiting(record)
            record.state = "cancelled"
            self._totals["cancelled"] += 1
            self._forget_later(record)
            return Cancelled("queued", record.body)
        record = self._records.get(request_id)
        if record is None or record.lease is None:
            return Cancelled("gone")
        if not record.cancelled:
            record.cancelled = True
            self._owners[record.lease.owner].cancels.append(request_id)
        return Cancelled("running", None, record.lease.owner)

    def end_shed(self, request_id: str, finish: bytes) -> bool:
        if request_id not in self._shed_at:
            return False
        del self._shed_at[request_id]
        if record := self._records.get(request_id):
            record.finish = finish
        return True

    def shed_before(self, before_s: float, limit: int = 100) -> list[str]:
        shed = sorted((at, id_) for id_, at in self._shed_at.items() if at <= before_s)
        return [id_ for _, id_ in shed[:limit]]

    def renew(self, owner: str, lease_s: float, now: float | None = None) -> bool:
        state = self._owners.get(owner)
        if state is not None:
            state.expires_s = self._now(now) + lease_s
        return state is not None

    def release(self, owner: str, request_ids: Iterable[str] | None = None, *, failed: bool = False) -> int:
        held = self._owners[owner].held if owner in self._owners else {}
        ids = sorted(held) if request_ids is None else list(request_ids)
        records = [held[id_] for id_ in dict.fromkeys(ids) if id_ in held]
        for record in records:
            record.failures += failed
            self._requeue(record)
        return len(records)

    def expire(self, now: float | None = None) -> list[tuple[str, int]]:
        time_s = self._now(now)
        expired = sorted((state.expires_s, name) for name, state in self._owners.items() if state.expires_s <= time_s)
        answer = [(name, self.release(name, failed=True)) for _, name in expired]
        for _, name in expired:
            del self._owners[name]
        return answer

    def take_cancels(self, owner: str) -> list[str]:
        return list(self._owners[owner].cancels) if owner in self._owners else []

    def snapshot(self) -> QueueSnapshot:
        active = self.active_policy()
        return QueueSnapshot(
            depth=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            by_priority={level: num for level, num in sorted(self._by_priority.items()) if num},
            by_tenant={tenant: num for tenant, num in sorted(self._by_tenant.items()) if num},
            running=sum(len(state.held) for state in self._owners.values()),
            oldest_arrival_s=min((record.entry.arrival_s for record in self._waiting.values()), default=None),
            revision=active.revision,
            policy=active.name,
            params=active.params,
            **{f"{name}_total": self._totals[name] for name in _TOTALS},
        )

    def record(self, request_id: str) -> RequestRecordView | None:
        self._forget()
        r = self._records.get(request_id)
        if r is None:
            return None
        return RequestRecordView(r.state, r.attempt, r.output, r.finish, len(r.journal) // 4, r.body)

    def tokens(self, request_id: str) -> list[int]:
        record = self._records.get(request_id)
        return _tokens(record.journal) if record else []

    def position(self, request_id: str) -> Position | None:
        if request_id not in self._waiting:
            return None
        depth = len(self._waiting)
        found = self._flows.position(request_id, max(1.0, self._waiting_tokens / depth))
        return Position("", depth - 1, depth - 1) if found is None else Position(*found)

    def active_policy(self) -> ActivePolicy:
        return self._policy or _DEFAULT

    def init_policy(self, name: str, params: Mapping[str, Any], revision: int) -> bool:
        if self._policy is not None or self._waiting:
            return False
        self._policy = ActivePolicy(revision, name, dict(params))
        self._set_rules(build_policy(name, params).rules)
        return True

    def set_weight(self, flow: str, weight: float) -> bool:
        return self._flows.set_weight(flow, weight)

    def reply_to_requests(self, web: str) -> list[str]:
        live = (r for r in self._records.values() if r.state in ("queued", "running"))
        return [record.entry.id for record in live if record.reply_to == web]

    def switch(self, policy: Policy, revision: int) -> int:
        """`switch_policy` in memory: order what waits by `policy` under a higher revision; how many that were."""
        if revision <= self.active_policy().revision:
            raise ValueError(f"Revision {self.active_policy().revision} is active; {revision} comes too late.")
        self._flows, self._epoch = Flows(), self._epoch + 1
        self._unplaced.clear()
        for record in sorted(self._waiting.values(), key=lambda record: record.number):
            self._flows.place(record.entry.id, record.number, policy.place(record.entry))
        self._policy = ActivePolicy(revision, policy.name, dict(policy.params))
        self._set_rules(policy.rules)
        self._arrivals.clear()
        if self._promotes:
            self._arrivals.extend((record.entry.arrival_s, id_) for id_, record in self._waiting.items())
            heapify(self._arrivals)
        return len(self._waiting)

    def unplaced(self, limit: int = 500) -> tuple[ActivePolicy, list[QueueEntry]]:
        return self.active_policy(), [record.entry for record in list(self._unplaced.values())[:limit]]

    def place(self, placed: Sequence[tuple[str, Placement]], *, revision: int) -> int:
        if revision != self.active_policy().revision:
            return 0
        num_placed = 0
        for id_, placement in placed:
            if record := self._unplaced.pop(id_, None):
                self._flows.place(id_, record.number, placement)
                num_placed += 1
        return num_placed

    def _serve(
        self, owner: str, state: _Owner, max_requests: int, max_tokens: int, now: float
    ) -> list[tuple[str, int]]:
        flows, rules = self._flows, self._rules
        turn = _Turn(self, now) if self._reorders else None
        per_request, per_prompt, per_output = rules.request_price, rules.prompt_price, rules.output_price
        rows: list[tuple[str, int]] = []
        while len(rows) < max_requests and (head := flows.head() if turn is None else turn.next()) is not None:
            id_, rank, weight, flow = head
            record = self._waiting[id_]
            entry = record.entry
            tokens = entry.prompt_tokens + len(record.journal) // 4
            if tokens > max_tokens:
                break
            max_tokens -= tokens
            cost = entry.cost_tokens
            charge = per_request + per_prompt * entry.prompt_tokens + per_output * entry.max_tokens
            if turn is None:
                flows.take(charge)
            else:
                turn.take(charge)
            self._stop_waiting(record)
            record.attempt += 1
            record.state = "running"
            record.lease = _Lease(owner, flow, weight, rank, self._epoch)
            state.held[id_] = record
            if record.cancelled:
                state.cancels.append(id_)
            self._totals["claimed"] += 1
            self._totals["claimed_tokens"] += cost
            rows.append((id_, record.attempt))
        if rows:
            flows.settle()
        return rows

    def _find_victims(
        self, entry: QueueEntry, depth_limit: int, tokens_limit: float, shed: bool
    ) -> list[_Record] | None:
        """Who has to go for this request; None where those of lower priority do not suffice."""
        depth, tokens = len(self._waiting), self._waiting_tokens + entry.cost_tokens
        victims: list[_Record] = []
        if depth < depth_limit and (tokens <= tokens_limit or not depth):
            return victims
        if not shed or depth_limit <= 0:
            return None
        for victim in self._worst():
            if victim.entry.priority <= entry.priority or len(victims) == MAX_SHED:
                return None
            victims.append(victim)
            depth, tokens = depth - 1, tokens - victim.entry.cost_tokens
            if depth < depth_limit and (tokens <= tokens_limit or not depth):
                return victims
        return None

    def _worst(self) -> Iterator[_Record]:
        """Waiting requests that were never claimed, those of least right first."""
        if self._right is None or len(self._right) > 64 + 2 * len(self._waiting):
            fresh = (record for record in self._waiting.values() if not record.attempt)
            self._right = sorted((_right(record.entry), record.entry.id) for record in fresh)
        while self._right and not self._may_go(self._right[-1]):
            self._right.pop()
        for named in reversed(self._right):
            if self._may_go(named):
                yield self._waiting[named[1]]

    def _may_go(self, named: tuple[float, str]) -> bool:
        record = self._waiting.get(named[1])
        return record is not None and not record.attempt and _right(record.entry) == named[0]

    def _shed(self, record: _Record) -> Shed:
        id_ = record.entry.id
        if not self._flows.remove(id_):
            self._unplaced.pop(id_, None)
        self._stop_waiting(record)
        record.state = "failed"
        self._shed_at[id_] = self._clock()
        self._totals["shed"] += 1
        self._forget_later(record)
        return Shed(id_, record.body)

    def _promoted(self, now: float) -> tuple[str, float, float, str] | None:
        """Who has waited for so long that it is next."""
        after_s, arrivals = self._rules.promote_after_s, self._arrivals
        while after_s is not None and arrivals:
            arrival_s, id_ = arrivals[0]
            record = self._waiting.get(id_)
            if record is not None and record.entry.arrival_s == arrival_s:
                return self._flows.find(id_) if now - arrival_s >= after_s else None
            heappop(arrivals)
        return None

    def _charge(self, entry: QueueEntry) -> float:
        return self._rules.charge(entry.prompt_tokens, entry.max_tokens)

    def _set_rules(self, rules: QueueRules) -> None:
        self._rules, self._reorders = rules, rules.reorders
        self._promotes = rules.promote_after_s is not None

    def _holds(self, owner: str, request_id: str, attempt: int) -> bool:
        record = self._records.get(request_id)
        return bool(record and record.lease and record.lease.owner == owner and record.attempt == attempt)

    def _requeue(self, record: _Record) -> None:
        lease, id_ = self._stop_running(record), record.entry.id
        record.state = "queued"
        self._start_waiting(record)
        if lease.epoch == self._epoch:
            self._flows.correct(lease.flow, -self._charge(record.entry) / lease.weight)
            self._flows.place(id_, record.number, Placement(flow=lease.flow, weight=lease.weight, rank=lease.rank))
        else:
            self._unplaced[id_] = record
        self._totals["requeued"] += 1

    def _start_waiting(self, record: _Record) -> None:
        entry = record.entry
        self._waiting[entry.id] = record
        if self._promotes:
            heappush(self._arrivals, (entry.arrival_s, entry.id))
        self._by_priority[entry.priority] += 1
        self._by_tenant[entry.tenant] += 1
        self._waiting_tokens += entry.cost_tokens

    def _stop_waiting(self, record: _Record) -> None:
        entry = record.entry
        del self._waiting[entry.id]
        self._by_priority[entry.priority] -= 1
        self._by_tenant[entry.tenant] -= 1
        if not self._by_tenant[entry.tenant]:
            del self._by_tenant[entry.tenant]
        self._waiting_tokens -= entry.cost_tokens

    def _stop_running(self, record: _Record) -> _Lease:
        lease = record.lease
        assert lease is not None
        state = self._owners[lease.owner]
        del state.held[record.entry.id]
        if record.cancelled:
            state.cancels.remove(record.entry.id)
        record.lease = None
        return lease

    def _forget_later(self, record: _Record) -> None:
        heappush(self._ended, (self._clock() + record.keep_s, record.entry.id))

    def _forget(self) -> None:
        now = self._clock()
        while self._ended and self._ended[0][0] <= now:
            self._records.pop(heappop(self._ended)[1], None)

    def _now(self, now: float | None) -> float:
        return self._clock() if now is None else now


class _Turn:
    """Whose turn it is within one claim, under rules: the promoted, then a run that has begun, then the flows."""

    def __init__(self, queue: FlowQueue, now: float) -> None:
        self._queue, self._flows, self._rules, self._now = queue, queue._flows, queue._rules, now
        slack_s = self._rules.late_slack_s
        self._late_before = -math.inf if slack_s is None else now + slack_s
        self._demotions_left = MAX_DEMOTIONS
        self._run, self._run_left = "", 0
        self._next: tuple[str, bool] = ("", False)
        """Who was named last, and whether it was promoted."""

    def next(self) -> tuple[str, float, float, str] | None:
        head = self._queue._promoted(self._now)
        self._next = ("" if head is None else head[0], head is not None)
        return self._by_turn() if head is None else head

    def take(self, charge: float) -> None:
        id_, promoted = self._next
        self._flows.take_out_of_turn(id_, charge)
        if not promoted:
            self._run_left -= 1

    def _by_turn(self) -> tuple[str, float, float, str] | None:
        while True:
            head = self._flows.head_of(self._run) if self._run_left else None
            if head is None:
                if (head := self._flows.head()) is None:
                    return None
                self._run, self._run_left = head[3], self._rules.run
            if head[1] >= self._late_before:
                self._next = (head[0], False)
                return head
            if not self._demotions_left:
                return None
            self._demotions_left -= 1
            self._flows.demote(head[0], LATE)


_DEFAULT = ActivePolicy(0, "fifo", {})
_TOTALS = ("enqueued", "claimed", "claimed_tokens", "finished", "finished_tokens", "cancelled", "requeued", "shed")


def _right(entry: QueueEntry) -> float:
    return entry.priority * PRIORITY_STEP + entry.arrival_s


def _tokens(journal: bytearray) -> list[int]:
    return list(struct.unpack(f"<{len(journal) // 4}i", journal)) if journal else []
