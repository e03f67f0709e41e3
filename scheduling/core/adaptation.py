"""The policy in force on a queue in memory; where it is `adaptive`, its switches, as ops makes them in a fleet."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from scheduling.core.adaptive import AdaptiveState, choose, observe
from scheduling.core.policies import build_policy
from scheduling.core.policy import Params, Policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry

PERIOD_S = 2.0
"""How often the adaptive policy looks."""
SAMPLE = 200
"""Waiting requests that it looks at."""
MAX_CHANGES = 10_000
"""Switches that are remembered: a batcher may live for months."""


class PolicyChange(NamedTuple):
    """A switch that the adaptive policy made."""

    time_s: float
    policy: str
    reason: str


class PolicyInForce:
    """Knows the policy, its revision, and what waits."""

    def __init__(
        self, policy: Policy, queue: FlowQueue, deadline: Callable[[QueueEntry, Params], float], now_s: float = 0.0
    ) -> None:
        """`deadline` gives a request's, by the parameters of the policy."""
        self.policy = policy
        self.revision = 1
        self.changes: deque[PolicyChange] = deque(maxlen=MAX_CHANGES)
        """The latest, newest last."""
        self.is_adaptive = policy.name == "adaptive"
        self._queue = queue
        self._deadline = deadline
        self._waiting: dict[str, QueueEntry] = {}
        self._state = AdaptiveState(switched_s=now_s)
        self._due_s = now_s
        queue.init_policy(policy.name, policy.params, self.revision)

    @property
    def chosen(self) -> str:
        """The policy by which requests go: its own name, or the one that `adaptive` has chosen."""
        return str(self.policy.params["current"]) if self.is_adaptive else self.policy.name

    @property
    def is_timed(self) -> bool:
        """Whether who goes next changes by time alone."""
        rules = self.policy.rules
        return rules.promote_after_s is not None or rules.late_slack_s is not None

    def note(self, entry: QueueEntry) -> None:
        """A request waits."""
        if self.is_adaptive:
            self._waiting[entry.id] = entry

    def forget(self, request_id: str) -> None:
        """A request waits no more."""
        if self.is_adaptive:
            del self._waiting[request_id]

    def look(self, now_s: float) -> None:
        """`judge`, where that is due again."""
        if self.is_adaptive and now_s >= self._due_s:
            self._due_s = now_s + PERIOD_S
            self.judge(now_s)

    def judge(self, now_s: float) -> None:
        """Look at what waits, and switch where another policy fits better and has done so for long enough."""
        waiting = list(self._waiting.values())
        sample = waiting[:: max(1, len(waiting) // SAMPLE)]
        params = self.policy.params
        conditions = observe(sample, len(waiting), now_s, lambda entry: self._deadline(entry, params))
        self._state, choice = choose(self._state, conditions, current=params["current"], params=params, now=now_s)
        if choice is not None:
            self.revision += 1
            self.policy = build_policy("adaptive", {**params, "current": choice.policy})
            self._queue.switch(self.policy, self.revision)
            self.changes.append(PolicyChange(now_s, choice.policy, choice.reason))
