"""Flows: push-in-first-out lists served by virtual time, the order behind every policy."""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace

from scheduling.core.request import Placement


@dataclass(slots=True)
class _Flow:
    vt: float
    weight: float
    members: list[tuple[float, int, str]] = field(default_factory=list)
    """A heap of (rank, arrival number, id); those cancelled stay until they come up."""
    num_live: int = 0


class Flows:
    """Backlogged flows, served in the order of their virtual time, the flow's name deciding between equals.

    Serving a flow charges tokens / weight to it. A flow that becomes backlogged starts at the system's virtual time
    (that of the flow served last) unless it is ahead of it: who was idle saves no credit. Start-time fair queueing
    (Goyal et al., SIGCOMM 1996, section 2) with the costs of the virtual token counter (Sheng et al., OSDI 2024,
    section 4).
    """

    def __init__(self) -> None:
        self.vt = 0.0
        self._flows: dict[str, _Flow] = {}
        self._idle: dict[str, float] = {}
        """Drained flows that are ahead of the system."""
        self._order: list[tuple[float, str]] = []
        """A heap of (virtual time, flow); out-of-date pairs are dropped when they come up."""
        self._at: dict[str, tuple[str, tuple[float, int, str]]] = {}
        """id -> flow and the member that counts: one that came back has left another of its kind in the heap."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._at

    def place(self, request_id: str, number: int, placement: Placement) -> None:
        """Push a request into its flow; equal ranks are served in the order of `number`."""
        name = placement.flow
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = _Flow(max(self.vt, self._idle.pop(name, 0.0)), placement.weight)
            heappush(self._order, (flow.vt, name))
        flow.weight = placement.weight
        flow.num_live += 1
        member = (placement.rank, number, request_id)
        heappush(flow.members, member)
        self._at[request_id] = (name, member)

    def head(self) -> tuple[str, float, float, str] | None:
        """Who is served next: id, rank, and its flow's weight and name."""
        order, flows = self._order, self._flows
        while order:
            vt, name = order[0]
            flow = flows.get(name)
            if flow is not None and flow.vt == vt:
                members = flow.members
                while not self._is_live(members[0]):
                    heappop(members)
                return members[0][2], members[0][0], flow.weight, name
            heappop(order)
        return None

    def head_of(self, name: str) -> tuple[str, float, float, str] | None:
        """`head` of one flow, whoever's turn it is."""
        flow = self._flows.get(name)
        if flow is None:
            return None
        while not self._is_live(flow.members[0]):
            heappop(flow.members)
        return flow.members[0][2], flow.members[0][0], flow.weight, name

    def find(self, request_id: str) -> tuple[str, float, float, str] | None:
        """What `head` would say of this request if it were next; None where it is in no flow."""
        placed = self._at.get(request_id)
        return None if placed is None else (request_id, placed[1][0], self._flows[placed[0]].weight, placed[0])

    def demote(self, request_id: str, by: float) -> None:
        """Give a flow's head a rank that is larger by `by`."""
        name, (rank, number, _) = self._at[request_id]
        member = (rank + by, number, request_id)
        self._at[request_id] = (name, member)
        heapreplace(self._flows[name].members, member)

    def take(self, cost_tokens: float) -> None:
        """Serve the request that `head` just named and charge its flow."""
        vt, name = self._order[0]
        flow = self._flows[name]
        self.vt = max(self.vt, vt)
        del self._at[heappop(flow.members)[2]]
        flow.num_live -= 1
        charged = vt + cost_tokens / flow.weight
        if flow.num_live:
            self._move(flow, name, charged)
        else:
            self._drain(name, charged)

    def take_out_of_turn(self, request_id: str, cost_tokens: float) -> None:
        """Serve any request and charge its flow; the system's virtual time follows the flow whose turn it was."""
        self.head()
        self.vt = max(self.vt, self._order[0][0])
        name = self._at.pop(request_id)[0]
        flow = self._flows[name]
        flow.num_live -= 1
        charged = flow.vt + cost_tokens / flow.weight
        if flow.num_live:
            self._move(flow, name, charged)
        else:
            self._drain(name, charged)

    def settle(self) -> None:
        """Forget drained flows that the system has caught up with."""
        if self._idle:
            self._idle = {name: vt for name, vt in self._idle.items() if vt > self.vt}

    def remove(self, request_id: str) -> bool:
        """Take a request out; False where it is not there."""
        placed = self._at.pop(request_id, None)
        if placed is None:
            return False
        flow = self._flows[placed[0]]
        flow.num_live -= 1
        if not flow.num_live:
            self._drain(placed[0], flow.vt)
        return True

    def correct(self, name: str, delta: float) -> None:
        """Change a flow's virtual time by tokens / weight that were charged too little (or, negative, too much)."""
        flow = self._flows.get(name)
        if flow is not None:
            self._move(flow, name, flow.vt + delta)
            return
        vt = self._idle.pop(name, self.vt) + delta
        if vt > self.vt:
            self._idle[name] = vt

    def set_weight(self, name: str, weight: float) -> bool:
        """Change a backlogged flow's weight; False where it is not backlogged."""
        flow = self._flows.get(name)
        if flow is not None:
            flow.weight = weight
        return flow is not None

    def position(self, request_id: str, mean_cost: float) -> tuple[str, int, int] | None:
        """Flow, requests before it in the flow, and before it in all if every request were of mean cost."""
        placed = self._at.get(request_id)
        if placed is None:
            return None
        name, at = placed
        own = self._flows[name]
        ahead = sum(self._is_live(member) and member < at for member in own.members)
        due = own.vt + ahead * mean_cost / own.weight
        before = ahead
        for other, flow in self._flows.items():
            if other != name and flow.vt <= due:
                before += min(flow.num_live, int((due - flow.vt) * flow.weight / mean_cost) + 1)
        return name, ahead, before

    def _is_live(self, member: tuple[float, int, str]) -> bool:
        placed = self._at.get(member[2])
        return placed is not None and placed[1] is member

    def _move(self, flow: _Flow, name: str, vt: float) -> None:
        flow.vt = vt
        heappush(self._order, (vt, name))
        if len(self._order) > 64 + 4 * len(self._flows):
            self._order = [(flow.vt, name) for name, flow in self._flows.items()]
            heapify(self._order)

    def _drain(self, name: str, vt: float) -> None:
        del self._flows[name]
        if vt > self.vt:
            self._idle[name] = vt
