"""The policy in force during a simulation; where it is `adaptive`, its switches, as ops makes them in a fleet."""

from scheduling.core.adaptive import AdaptiveState, choose, observe
from scheduling.core.policies import build_policy, deadline_of
from scheduling.core.policy import Policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import QueueEntry
from scheduling.core.simulation.outcome import PolicyChange, ServiceTargets

SAMPLE = 200
"""Waiting requests that the adaptive policy looks at."""


class SimulatedPolicy:
    """Knows the policy, its revision, and what waits."""

    period_s = 2.0
    """How often the adaptive policy looks."""

    def __init__(self, policy: Policy, queue: FlowQueue, targets: ServiceTargets) -> None:
        self.policy = policy
        self.revision = 1
        self.changes: list[PolicyChange] = []
        self.is_adaptive = policy.name == "adaptive"
        self._queue = queue
        self._targets = targets
        self._waiting: dict[str, QueueEntry] = {}
        self._state = AdaptiveState(switched_s=0.0)
        queue.init_policy(policy.name, policy.params, self.revision)

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

    def judge(self, now_s: float) -> None:
        """Look at what waits, and switch where another policy fits better and has done so for long enough."""
        waiting = list(self._waiting.values())
        sample = waiting[:: max(1, len(waiting) // SAMPLE)]
        params = self.policy.params
        conditions = observe(sample, len(waiting), now_s, self._deadline)
        self._state, choice = choose(self._state, conditions, current=params["current"], params=params, now=now_s)
        if choice is not None:
            self.revision += 1
            self.policy = build_policy("adaptive", {**params, "current": choice.policy})
            self._queue.switch(self.policy, self.revision)
            self.changes.append(PolicyChange(now_s, choice.policy, choice.reason))

    def _deadline(self, entry: QueueEntry) -> float:
        """A request's own deadline, or its arrival plus its end-to-end target, or the policy's own target."""
        e2e_s = self._targets.of(entry).e2e_s
        if entry.deadline_s is not None or e2e_s is None:
            return deadline_of(entry, self.policy.params)
        return entry.arrival_s + e2e_s
