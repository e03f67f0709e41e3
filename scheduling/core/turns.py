"""Whose turn it is within one claim of the queue in memory."""

from scheduling.core.backlog import Backlog
from scheduling.core.flows import RANK, Head
from scheduling.core.rules import QueueRules


class Turns:
    """Names one request after the other: the promoted, then a run that has begun, then the flow whose turn it is.

    Without rules `Flows.head` says the same, in less time.
    """

    def __init__(self, backlog: Backlog, rules: QueueRules, now: float) -> None:
        self._backlog, self._flows, self._run_length = backlog, backlog.flows, rules.run
        self._now, self._promote_after_s = now, rules.promote_after_s
        self._late_before = rules.late_before(now)
        self._run, self._run_left = "", 0

    def next(self) -> Head | None:
        """Who is served next. It has to be taken before the next call."""
        if self._promote_after_s is not None:
            head = self._backlog.oldest(self._now, self._promote_after_s)
            if head is not None:
                return head
        return self._by_turn()

    def _by_turn(self) -> Head | None:
        head = self._flows.head_of(self._run) if self._run_left else None
        if head is None:
            if (head := self._flows.head()) is None:
                return None
            self._run, self._run_left = head[0].name, self._run_length
        self._run_left -= 1
        flow, chunk, _ = head
        if chunk.columns[RANK][0] >= self._late_before:
            return head
        hopeful = flow.first_from(self._late_before)
        return head if hopeful is None else (flow, *hopeful)
