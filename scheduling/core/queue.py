"""The queue in memory: the operations and answers of the one in Redis, for simulation and as its reference in tests.

What waits lies in `Backlog`, in columns; a `Record` is made when a request is claimed (or ends, or is kept otherwise
than most), so that waiting costs little memory.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Any

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
from scheduling.core.backlog import Backlog
from scheduling.core.flows import BODY, ENTRY, NUMBER, RANK
from scheduling.core.policies import Policy, build_policy
from scheduling.core.records import Owner, Record, read_tokens
from scheduling.core.request import Placement, QueueEntry
from scheduling.core.rules import MAX_EXPIRED, PLAIN, QueueRules
from scheduling.core.turns import Turns

KEEP_S = 60
_NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})


class FlowQueue:
    """One model's queue. Methods are those of `FleetQueue`, whose docstrings hold here; results come directly."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._backlog = Backlog()
        self._records: dict[str, Record] = {}
        self._owners: dict[str, Owner] = {}
        self._charged: dict[str, list[str]] = {}
        """Owners whose lease ended, and the requests for which that counted as a failure."""
        self._epoch = 0
        self._policy: ActivePolicy | None = None
        self._rules: QueueRules = PLAIN
        self._reorders = False
        self._ended: list[tuple[float, str]] = []
        """A heap of (when a record is forgotten, id)."""
        self._dropped_at: dict[str, float] = {}
        """Of those whose end nobody has told their clients."""
        self._totals = dict.fromkeys(TOTALS, 0)

    def enqueue(
        self,
        entry: QueueEntry,
        placement: Placement,
        *,
        revision: int,
        body: bytes = b"",
        depth_limit: int,
        reply_to: str = "",
        keep_s: int = KEEP_S,
        tokens_limit: int | None = None,
        shed: bool = False,
    ) -> Enqueued:
        if self._ended:
            self._forget()
        backlog, active = self._backlog, self._policy.revision if self._policy else 0
        depth = backlog.depth
        if entry.id in backlog.flows.at or entry.id in self._records:
            return Enqueued("duplicate", depth, active)
        if revision != active:
            return Enqueued("stale", depth, active)
        dropped: tuple[Shed, ...] = ()
        if depth >= depth_limit or tokens_limit is not None:
            limit = math.inf if tokens_limit is None else tokens_limit
            victims = backlog.find_victims(entry, depth_limit, limit, shed)
            if victims is None:
                return Enqueued("full", depth, active, (), backlog.tokens if depth < depth_limit else None)
            dropped = tuple([self._drop(victim, "shed") for victim in victims])
        self._totals["enqueued"] = number = self._totals["enqueued"] + 1
        if reply_to or keep_s != KEEP_S:
            self._records[entry.id] = Record(entry, number, body, reply_to, keep_s)
        backlog.add(entry, body, number, placement)
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
        max_priority: int | None = None,
    ) -> Claimed:
        if now is None:
            now = self._clock()
        state = self._owners.get(owner)
        if state is None:
            self._forgive(owner)
            state = self._owners[owner] = Owner(0.0)
        state.expires_s = now + lease_s
        dropped: tuple[Shed, ...] = ()
        more = False
        if number is not None and state.number == number:
            served = [self._records[id_] for id_, attempt in state.given if self._holds(owner, id_, attempt)]
        else:
            served = []
            if self._backlog.deadlines.size:
                dropped = self._drop_overdue(now, MAX_EXPIRED)
                more = self._backlog.overdue(now) is not None
            if not more:
                served = self._serve(owner, state, max_requests, max_tokens, now, max_priority)
            if number is not None:
                state.number, state.given = number, [(record.entry.id, record.attempt) for record in served]
        active = self._policy or _DEFAULT
        requests = [_claimed(record) for record in served]
        return Claimed(active.revision, active.name, requests, self._backlog.depth, dropped, more)

    def drop_expired(self, now: float | None = None, limit: int = MAX_EXPIRED) -> list[Shed]:
        return list(self._drop_overdue(self._now(now), limit))

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
                continue
            if not isinstance(record.journal, bytearray):
                record.journal = bytearray()
            record.journal[4 * start : 4 * start + len(packed)] = packed
        return lost

    def finish(
        self, owner: str, request_id: str, attempt: int, *, state: str, used_tokens: int, finish: bytes, output: str
    ) -> bool:
        if not self._holds(owner, request_id, attempt):
            return False
        record = self._records[request_id]
        self._stop_running(record)
        if record.epoch == self._epoch:
            entry, rules = record.entry, self._rules
            real = rules.charge_used(entry.prompt_tokens, used_tokens)
            self._backlog.flows.correct(record.flow, (real - self._charge(entry)) / record.weight)
        record.state, record.finish, record.output, record.cancelled = state, finish, output, False
        self._totals["finished"] += 1
        self._totals["finished_tokens"] += used_tokens
        self._forget_later(record)
        return True

    def cancel(self, request_id: str, token: str = "") -> Cancelled:
        if request_id in self._backlog:
            record = self._leave(request_id, "cancelled")
            record.canceller = token
            self._totals["cancelled"] += 1
            return Cancelled("queued", record.body)
        running = self._records.get(request_id)
        if running is not None and running.state == "cancelled" and running.canceller == token != "":
            return Cancelled("queued", running.body)
        if running is None or not running.owner:
            return Cancelled("gone")
        if not running.cancelled:
            running.cancelled = True
            self._owners[running.owner].cancels.append(request_id)
        return Cancelled("running", None, running.owner)

    def end_shed(self, request_id: str, finish: bytes) -> bool:
        if request_id not in self._dropped_at:
            return False
        del self._dropped_at[request_id]
        if record := self._records.get(request_id):
            record.finish = finish
        return True

    def shed_before(self, before_s: float, limit: int = 100) -> list[str]:
        dropped = sorted((at, id_) for id_, at in self._dropped_at.items() if at <= before_s)
        return [id_ for _, id_ in dropped[:limit]]

    def renew(self, owner: str, lease_s: float, now: float | None = None) -> bool:
        state = self._owners.get(owner)
        if state is not None:
            state.expires_s = self._now(now) + lease_s
        else:
            self._forgive(owner)
        return state is not None

    def end_lease(self, owner: str, within_s: float, now: float | None = None) -> bool:
        state = self._owners.get(owner)
        if state is not None:
            state.expires_s = min(state.expires_s, self._now(now) + within_s)
        return state is not None

    def release(self, owner: str, attempts: Mapping[str, int] | None = None, *, failed: bool = False) -> int:
        held = self._owners[owner].held if owner in self._owners else {}
        given = {id_: held[id_].attempt for id_ in sorted(held)} if attempts is None else attempts
        records = [held[id_] for id_, attempt in given.items() if id_ in held and held[id_].attempt == attempt]
        for record in records:
            record.failures += failed
            self._requeue(record)
        return len(records)

    def expire(self, now: float | None = None) -> list[tuple[str, int]]:
        time_s = self._now(now)
        expired = sorted((state.expires_s, name) for name, state in self._owners.items() if state.expires_s <= time_s)
        for _, name in expired:
            self._charged[name] = list(self._owners[name].held)
        answer = [(name, self.release(name, failed=True)) for _, name in expired]
        for _, name in expired:
            del self._owners[name]
        return answer

    def take_cancels(self, owner: str) -> list[str]:
        return list(self._owners[owner].cancels) if owner in self._owners else []

    def snapshot(self) -> QueueSnapshot:
        active, waiting = self.active_policy(), self._backlog.entries()
        return QueueSnapshot(
            depth=len(waiting),
            waiting_tokens=self._backlog.tokens,
            by_priority=dict(sorted(Counter(entry.priority for entry in waiting).items())),
            by_tenant=dict(sorted(Counter(entry.tenant for entry in waiting).items())),
            running=sum(len(state.held) for state in self._owners.values()),
            oldest_arrival_s=min((entry.arrival_s for entry in waiting), default=None),
            revision=active.revision,
            policy=active.name,
            params=active.params,
            **{f"{name}_total": self._totals[name] for name in TOTALS},
        )

    def record(self, request_id: str) -> RequestRecordView | None:
        self._forget()
        r = self._records.get(request_id)
        if r is not None:
            num_tokens = len(r.journal) // 4
            return RequestRecordView(r.state, r.attempt, r.output, r.finish, num_tokens, r.body, r.dropped)
        head = self._backlog.flows.find(request_id)
        return None if head is None else RequestRecordView("queued", 0, "", None, 0, head[1].columns[BODY][head[2]])

    def tokens(self, request_id: str) -> list[int]:
        record = self._records.get(request_id)
        return read_tokens(record.journal) if record else []

    def position(self, request_id: str, now: float | None = None) -> Position | None:
        if request_id not in self._backlog:
            return None
        depth = self._backlog.depth
        late_before = self._rules.late_before(self._now(now))
        found = self._backlog.flows.position(request_id, max(1.0, self._backlog.tokens / depth), late_before)
        return Position("", depth - 1, depth - 1) if found is None else Position(*found)

    def active_policy(self) -> ActivePolicy:
        return self._policy or _DEFAULT

    def init_policy(self, name: str, params: Mapping[str, Any], revision: int) -> bool:
        if self._policy is not None or self._backlog.depth:
            return False
        self._policy = ActivePolicy(revision, name, dict(params))
        self._set_rules(build_policy(name, params).rules)
        self._backlog.keep_arrivals(self._rules.promote_after_s is not None)
        return True

    def set_weight(self, flow: str, weight: float) -> bool:
        return self._backlog.flows.set_weight(flow, weight)

    def reply_to_requests(self, web: str) -> list[str]:
        live = (r for r in self._records.values() if r.state in ("queued", "running"))
        return [record.entry.id for record in live if record.reply_to == web]

    def switch(self, policy: Policy, revision: int, weights: Mapping[str, float] = _NO_WEIGHTS) -> int:
        """`switch_policy` in memory: order what waits by `policy` under a higher revision; how many that were."""
        if revision <= self.active_policy().revision:
            raise ValueError(f"Revision {self.active_policy().revision} is active; {revision} comes too late.")
        self._epoch += 1
        self._policy = ActivePolicy(revision, policy.name, dict(policy.params))
        self._set_rules(policy.rules)
        self._backlog.reorder(policy, weights)
        return self._backlog.depth

    def unplaced(self, limit: int = 500) -> tuple[ActivePolicy, list[QueueEntry]]:
        return self.active_policy(), [record.entry for record in list(self._backlog.unplaced.values())[:limit]]

    def place(self, placed: Sequence[tuple[str, Placement]], *, revision: int) -> int:
        if revision != self.active_policy().revision:
            return 0
        return sum(self._backlog.place(id_, placement) for id_, placement in placed)

    def _serve(
        self, owner: str, state: Owner, max_requests: int, max_tokens: int, now: float, max_priority: int | None
    ) -> list[Record]:
        backlog, flows, rules, records = self._backlog, self._backlog.flows, self._rules, self._records
        if max_priority is not None and not rules.preempts:
            return []
        turns = Turns(backlog, rules, now) if self._reorders and self._needs_turns(max_requests, now) else None
        next_head = flows.head if turns is None else turns.next
        claimed_tokens, served = 0, list[Record]()
        while len(served) < max_requests and (head := next_head()) is not None:
            flow, chunk, at = head
            columns = chunk.columns
            entry = columns[ENTRY][at]
            record = records.get(entry.id)
            tokens = entry.prompt_tokens + (len(record.journal) // 4 if record else 0)
            if tokens > max_tokens or (max_priority is not None and entry.priority > max_priority):
                break
            max_tokens -= tokens
            if record is None:
                records[entry.id] = record = Record(entry, columns[NUMBER][at], columns[BODY][at])
            record.owner, record.flow, record.weight = owner, flow.name, flow.weight
            record.rank, record.epoch = columns[RANK][at], self._epoch
            record.attempt += 1
            record.state = "running"
            flows.take(head, rules.charge(entry.prompt_tokens, entry.max_tokens))
            backlog.discount(entry)
            state.held[entry.id] = record
            if record.cancelled:
                state.cancels.append(entry.id)
            claimed_tokens += entry.prompt_tokens + entry.max_tokens
            served.append(record)
        if served:
            self._totals["claimed"] += len(served)
            self._totals["claimed_tokens"] += claimed_tokens
        return served

    def _needs_turns(self, max_requests: int, now: float) -> bool:
        """Whether the rules can change anything in this claim."""
        rules, backlog = self._rules, self._backlog
        if rules.late_slack_s is not None or (rules.run > 1 and max_requests > 1):
            return True
        return rules.promote_after_s is not None and backlog.is_due(now, rules.promote_after_s)

    def _drop_overdue(self, now: float, limit: int) -> tuple[Shed, ...]:
        dropped: list[Shed] = []
        while len(dropped) < limit and (entry := self._backlog.overdue(now)) is not None:
            dropped.append(self._drop(entry.id, "deadline_exceeded"))
        return tuple(dropped)

    def _drop(self, request_id: str, reason: DropReason) -> Shed:
        record = self._leave(request_id, "failed")
        record.dropped = reason
        self._dropped_at[request_id] = self._clock()
        self._totals["shed" if reason == "shed" else "expired"] += 1
        return Shed(request_id, record.body, reason)

    def _leave(self, request_id: str, state: str) -> Record:
        """A waiting request ends here; its record."""
        removed = self._backlog.remove(request_id)
        record = self._records.setdefault(request_id, removed)
        record.state = state
        self._forget_later(record)
        return record

    def _requeue(self, record: Record) -> None:
        self._stop_running(record)
        record.state = "queued"
        placement = None
        if record.epoch == self._epoch:
            self._backlog.flows.correct(record.flow, -self._charge(record.entry) / record.weight)
            # While others of the flow wait, theirs is the later word on its weight.
            weight = self._backlog.flows.weight_of(record.flow) or record.weight
            placement = Placement(flow=record.flow, weight=weight, rank=record.rank)
        self._backlog.put_back(record, placement)
        self._totals["requeued"] += 1

    def _forgive(self, owner: str) -> None:
        """An owner whose lease had ended is there after all: the failures counted then were none."""
        for id_ in self._charged.pop(owner, ()):
            if (record := self._records.get(id_)) and record.failures:
                record.failures -= 1

    def _stop_running(self, record: Record) -> None:
        state = self._owners[record.owner]
        del state.held[record.entry.id]
        if record.cancelled:
            state.cancels.remove(record.entry.id)
        record.owner = ""

    def _set_rules(self, rules: QueueRules) -> None:
        self._rules, self._reorders = rules, rules.reorders

    def _charge(self, entry: QueueEntry) -> float:
        return self._rules.charge(entry.prompt_tokens, entry.max_tokens)

    def _holds(self, owner: str, request_id: str, attempt: int) -> bool:
        record = self._records.get(request_id)
        return bool(record and record.owner == owner and record.attempt == attempt)

    def _forget_later(self, record: Record) -> None:
        heappush(self._ended, (self._clock() + record.keep_s, record.entry.id))

    def _forget(self) -> None:
        now = self._clock()
        while self._ended and self._ended[0][0] <= now:
            self._records.pop(heappop(self._ended)[1], None)

    def _now(self, now: float | None) -> float:
        return self._clock() if now is None else now


_DEFAULT = ActivePolicy(0, "fifo", {})


def _claimed(record: Record) -> ClaimedRequest:
    tokens = read_tokens(record.journal) if record.journal else []
    return ClaimedRequest(record.entry.id, record.body, record.attempt, tokens, record.failures)
