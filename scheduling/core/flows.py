"""Flows: push-in-first-out lists served by virtual time, the order behind every policy."""

from array import array
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace

from scheduling.core.request import Placement, QueueEntry
from scheduling.core.rows import CHUNK, Chunk, Rows

RANK, NUMBER, ENTRY, BODY = 0, 1, 2, 3
"""Columns of a flow."""
MAX_SPARE = 16
MIN_IDLE = 64
Row = tuple[float, int, QueueEntry, bytes]
Head = tuple["Flow", Chunk, int]
"""A waiting request: its flow, and where it stands there."""


class Flow(Rows):
    """Waiting requests by rank, then arrival number."""

    __slots__ = ("at", "name", "vt", "weight")

    def __init__(self, at: dict[str, Chunk]) -> None:
        """`at` is told the chunk of each request."""
        super().__init__(array("d"), array("q"), [], [])
        self.name = ""
        self.weight = 1.0
        self.vt = 0.0
        self.at = at

    def push(self, rank: float, number: int, entry: QueueEntry, body: bytes) -> None:
        """Put a request in its place."""
        chunk, at = self.locate(rank, number)
        ranks, numbers, entries, bodies = chunk.columns
        ranks.insert(at, rank)
        numbers.insert(at, number)
        entries.insert(at, entry)
        bodies.insert(at, body)
        self.at[entry.id] = chunk
        self.size += 1
        if len(ranks) > CHUNK:
            self._split(chunk, at)

    def row(self, chunk: Chunk, at: int) -> Row:
        """What stands there."""
        ranks, numbers, entries, bodies = chunk.columns
        return ranks[at], numbers[at], entries[at], bodies[at]

    def _split(self, chunk: Chunk, at: int) -> Chunk:
        upper = super()._split(chunk, at)
        self.at.update((entry.id, upper) for entry in upper.columns[ENTRY])
        return upper


class Flows:
    """Backlogged flows, served in the order of their virtual time, the flow's name deciding between equals.

    Serving a flow charges tokens / weight to it. A flow that becomes backlogged starts at the system's virtual time
    (that of the flow served last) unless it is ahead of it: who was idle saves no credit. Start-time fair queueing
    (Goyal et al., SIGCOMM 1996, section 2) with the costs of the virtual token counter (Sheng et al., OSDI 2024,
    section 4).
    """

    def __init__(self) -> None:
        self.vt = 0.0
        self._flows: dict[str, Flow] = {}
        self._idle: dict[str, float] = {}
        """Virtual time of drained flows that are ahead of the system, and of some that no longer are."""
        self._most_idle = MIN_IDLE
        """When to forget the latter."""
        self._spare: list[Flow] = []
        """Empty ones, to be used again: a class or tenant that is served faster than it comes drains at every claim."""
        self._order: list[tuple[float, str]] = []
        """A heap of (virtual time, flow); out-of-date pairs are dropped when they come up."""
        self.at: dict[str, Chunk] = {}
        """Where each request stands."""

    def __iter__(self) -> Iterator[Row]:
        for flow in self._flows.values():
            yield from flow

    def place(self, entry: QueueEntry, body: bytes, number: int, placement: Placement) -> None:
        """Push a request into its flow; equal ranks are served in the order of `number`."""
        name, weight, rank = placement
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = self._spare.pop() if self._spare else Flow(self.at)
            flow.name = name
            self._move(flow, max(self.vt, self._idle.pop(name, 0.0)))
        flow.weight = weight
        flow.push(rank, number, entry, body)

    def head(self) -> Head | None:
        """Who is served next."""
        order, flows = self._order, self._flows
        while order:
            vt, name = order[0]
            flow = flows.get(name)
            if flow is not None and flow.vt == vt:
                return flow, flow.chunks[0], 0
            heappop(order)
        return None

    def head_of(self, name: str) -> Head | None:
        """`head` of one flow, whoever's turn it is."""
        flow = self._flows.get(name)
        return None if flow is None else (flow, flow.chunks[0], 0)

    def find(self, request_id: str) -> Head | None:
        """Where a request stands; None where it is in no flow."""
        chunk = self.at.get(request_id)
        if chunk is None:
            return None
        flow = chunk.rows
        assert isinstance(flow, Flow)
        entries = chunk.columns[ENTRY]
        if entries[0].id == request_id:  # as it mostly is when its turn has come
            return flow, chunk, 0
        return flow, chunk, next(at for at, entry in enumerate(entries) if entry.id == request_id)

    def take(self, head: Head, cost_tokens: float) -> None:
        """Serve a request and charge its flow; the system's virtual time follows the flow whose turn it was."""
        flow, chunk, at = head
        order, name, vt = self._order, flow.name, flow.vt
        has_turn = order[0] == (vt, name)
        if not has_turn:
            self.head()
            has_turn = order[0] == (vt, name)
        if order[0][0] > self.vt:
            self.vt = order[0][0]
        del self.at[chunk.columns[ENTRY][at].id]
        flow.delete(chunk, at)
        charged = vt + cost_tokens / flow.weight
        if not flow.size:
            self._drain(flow, charged)
        elif has_turn:
            flow.vt = charged
            heapreplace(order, (charged, name))
        else:
            self._move(flow, charged)

    def remove(self, request_id: str) -> Row | None:
        """Take a request out; None where it is not there."""
        head = self.find(request_id)
        if head is None:
            return None
        flow, chunk, at = head
        row = flow.row(chunk, at)
        flow.delete(chunk, at)
        del self.at[request_id]
        if not flow.size:
            self._drain(flow, flow.vt)
        return row

    def correct(self, name: str, delta: float) -> None:
        """Change a flow's virtual time by tokens / weight that were charged too little (or, negative, too much)."""
        flow = self._flows.get(name)
        if flow is not None:
            self._move(flow, flow.vt + delta)
            return
        self._remember(name, max(self.vt, self._idle.pop(name, 0.0)) + delta)

    def weight_of(self, name: str) -> float | None:
        """A backlogged flow's weight; None where it is not backlogged."""
        flow = self._flows.get(name)
        return None if flow is None else flow.weight

    def set_weight(self, name: str, weight: float) -> bool:
        """Change a backlogged flow's weight; False where it is not backlogged."""
        flow = self._flows.get(name)
        if flow is not None:
            flow.weight = weight
        return flow is not None

    def position(self, request_id: str, mean_cost: float, late_before: float) -> tuple[str, int, int] | None:
        """Flow, requests before it in the flow, and before it in all if every request were of mean cost.

        Whoever's rank is below `late_before` goes after the rest of its flow.
        """
        head = self.find(request_id)
        if head is None:
            return None
        own, chunk, at = head
        ahead = own.before(chunk, at)
        hopeful = own.first_from(late_before)
        num_late = own.before(*hopeful) if hopeful else 0
        ahead += own.size - num_late if ahead < num_late else -num_late
        due = own.vt + ahead * mean_cost / own.weight
        before = ahead
        for flow in self._flows.values():
            if flow is not own and flow.vt <= due:
                before += min(flow.size, int((due - flow.vt) * flow.weight / mean_cost) + 1)
        return own.name, ahead, before

    def _move(self, flow: Flow, vt: float) -> None:
        flow.vt = vt
        heappush(self._order, (vt, flow.name))
        if len(self._order) > 64 + 4 * len(self._flows):
            self._order = [(flow.vt, flow.name) for flow in self._flows.values()]
            heapify(self._order)

    def _drain(self, flow: Flow, vt: float) -> None:
        del self._flows[flow.name]
        if len(self._spare) < MAX_SPARE:
            self._spare.append(flow)
        self._remember(flow.name, vt)

    def _remember(self, name: str, vt: float) -> None:
        """A drained flow's virtual time, while it is ahead of the system."""
        if vt <= self.vt:
            return
        idle = self._idle
        idle[name] = vt
        if len(idle) > self._most_idle:
            self._idle = {name: vt for name, vt in idle.items() if vt > self.vt}
            self._most_idle = MIN_IDLE + 2 * len(self._idle)
