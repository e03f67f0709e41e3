"""What waits: in flows, in the orders that cut across them (arrival, right to stay, deadline), and counted."""

from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import inf

from scheduling.core.flows import Flows, Head
from scheduling.core.policy import Policy
from scheduling.core.records import Record
from scheduling.core.request import Placement, QueueEntry
from scheduling.core.rows import Rows
from scheduling.core.rules import MAX_SHED


class Backlog:
    """The waiting requests of one queue. Orders that nobody needs yet are not kept."""

    def __init__(self) -> None:
        self.flows = Flows()
        self.unplaced: dict[str, Record] = {}
        """Waiting in no flow until somebody runs the active policy on them."""
        self.depth = 0
        self.tokens = 0
        self._returned: set[str] = set()
        """Who was claimed before, and so is never dropped."""
        self._promotes = self._sheds = False
        """Whether the rules promote; whether ever one was to be dropped for another."""
        self._arrivals: defaultdict[int, Rows] = defaultdict(_by_time)
        """By arrival, then id, while one of these needs it: under its priority once some are dropped for others, until
        then all under 0. Who was claimed before is in it only where the rules promote."""
        self.deadlines = _by_time()
        """Those of the others that are dropped when their deadline passes."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.flows.at or request_id in self.unplaced

    def add(self, entry: QueueEntry, body: bytes, number: int, placement: Placement) -> None:
        """A new request waits."""
        self._count(entry)
        if self._promotes or self._sheds:
            self._arrivals[entry.priority if self._sheds else 0].insert(entry.arrival_s, entry.id)
        if entry.drop_expired and entry.deadline_s is not None:
            self.deadlines.insert(entry.deadline_s, entry.id)
        self.flows.place(entry, body, number, placement)

    def put_back(self, record: Record, placement: Placement | None) -> None:
        """A request that was claimed waits again; without a placement until `place`."""
        self._count(record.entry)
        self._returned.add(record.entry.id)
        if self._promotes:
            self._arrivals[record.entry.priority if self._sheds else 0].insert(record.entry.arrival_s, record.entry.id)
        if placement is None:
            self.unplaced[record.entry.id] = record
        else:
            self.flows.place(record.entry, record.body, record.number, placement)

    def place(self, request_id: str, placement: Placement) -> bool:
        """Put an unplaced request into its flow; False where it is none.

        While others of the flow wait, theirs is the later word on its weight.
        """
        record = self.unplaced.pop(request_id, None)
        if record is not None:
            weight = self.flows.weight_of(placement.flow) or placement.weight
            self.flows.place(record.entry, record.body, record.number, placement._replace(weight=weight))
        return record is not None

    def remove(self, request_id: str) -> Record:
        """Take a waiting request out, as a record of it."""
        record = self.unplaced.pop(request_id, None)
        if record is None:
            row = self.flows.remove(request_id)
            assert row is not None
            record = Record(row[2], row[1], row[3])
        self.discount(record.entry)
        return record

    def reorder(self, policy: Policy, weights: Mapping[str, float]) -> None:
        """Place everything anew, by the weights that tenants have now."""
        rows = [(number, entry, body) for _, number, entry, body in self.flows]
        rows += [(record.number, record.entry, record.body) for record in self.unplaced.values()]
        rows.sort(key=lambda row: row[0])
        self.flows = Flows()
        self.unplaced.clear()
        for number, entry, body in rows:
            self.flows.place(entry, body, number, policy.place(entry.at_weight(weights)))
        self.keep_arrivals(policy.rules.promote_after_s is not None)

    def keep_arrivals(self, is_needed: bool) -> None:
        """Keep the order of arrival of everybody, or no longer."""
        if is_needed != self._promotes:
            self._promotes = is_needed
            self._order_anew()

    def _order_anew(self) -> None:
        """By arrival what has to be; in that order it takes least memory."""
        self._arrivals.clear()
        if not (self._promotes or self._sheds):
            return
        for entry in sorted(self.entries(), key=lambda entry: (entry.arrival_s, entry.id)):
            if self._promotes or entry.id not in self._returned:
                self._arrivals[entry.priority if self._sheds else 0].insert(entry.arrival_s, entry.id)

    def entries(self) -> list[QueueEntry]:
        """Everything that waits, in no order."""
        return [row[2] for row in self.flows] + [record.entry for record in self.unplaced.values()]

    def is_due(self, now: float, after_s: float) -> bool:
        """Whether the first that arrived has waited so long. Arrivals have to be kept."""
        for rows in self._arrivals.values():
            times = rows.chunks[0].columns[0]
            if times and now - times[0] >= after_s:
                return True
        return False

    def oldest(self, now: float, after_s: float) -> Head | None:
        """The first that arrived, if it has waited so long and is placed. Arrivals have to be kept."""
        first_s, first = inf, ""
        for rows in self._arrivals.values():
            times, ids = rows.chunks[0].columns
            if times and (times[0] < first_s or (times[0] == first_s and ids[0] < first)):
                first_s, first = times[0], ids[0]
        return self.flows.find(first) if now - first_s >= after_s else None

    def overdue(self, now: float) -> QueueEntry | None:
        """Whose deadline passed first, of those that are dropped then."""
        keys, ids = self.deadlines.chunks[0].columns
        return self._entry(ids[0]) if keys and keys[0] < now else None

    def find_victims(self, entry: QueueEntry, depth_limit: int, tokens_limit: float, shed: bool) -> list[str] | None:
        """Who has to go for this request; None where those of lower priority do not suffice."""
        depth, tokens = self.depth, self.tokens + entry.cost_tokens
        victims: list[str] = []
        if depth < depth_limit and (tokens <= tokens_limit or not depth):
            return victims
        if not shed or depth_limit <= 0:
            return None
        for id_ in self._by_right():
            victim = self._entry(id_)
            if victim.priority <= entry.priority or len(victims) == MAX_SHED:
                return None
            victims.append(id_)
            depth, tokens = depth - 1, tokens - victim.cost_tokens
            if depth < depth_limit and (tokens <= tokens_limit or not depth):
                return victims
        return None

    def _by_right(self) -> Iterator[str]:
        """Who was never claimed; first who has the least right to stay: of the lowest priority, the latest."""
        if not self._sheds:
            self._sheds = True
            self._order_anew()
        for priority in sorted(self._arrivals, reverse=True):
            yield from (id_ for _, id_ in reversed(self._arrivals[priority]) if id_ not in self._returned)

    def _entry(self, request_id: str) -> QueueEntry:
        head = self.flows.find(request_id)
        assert head is not None
        _, chunk, at = head
        entry: QueueEntry = chunk.columns[2][at]
        return entry

    def _count(self, entry: QueueEntry) -> None:
        self.depth += 1
        self.tokens += entry.prompt_tokens + entry.max_tokens

    def discount(self, entry: QueueEntry) -> None:
        """Out of the counts and orders: it has been taken from its flow."""
        self.depth -= 1
        self.tokens -= entry.prompt_tokens + entry.max_tokens
        was_claimed = bool(self._returned) and entry.id in self._returned
        if self._promotes or (self._sheds and not was_claimed):
            self._arrivals[entry.priority if self._sheds else 0].discard(entry.arrival_s, entry.id)
        if was_claimed:
            self._returned.remove(entry.id)
            return
        if entry.drop_expired and entry.deadline_s is not None:
            self.deadlines.discard(entry.deadline_s, entry.id)


def _by_time() -> Rows:
    return Rows(array("d"), [])
