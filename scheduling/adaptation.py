"""Where `adaptive` is in force, look at what waits now and then, and switch to the policy that fits."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import redis

from scheduling.core.adaptive import AdaptiveState, choose, observe
from scheduling.core.policies import build_policy, deadline_of
from scheduling.core.request import QueueEntry
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.models import PolicyRevision
from scheduling.policy_switch import Announce, newest_revisions, switch_policy
from scheduling.selectors import find_service_levels
from scheduling.store import execute_many
from scheduling.switch import StaleRevision

logger = logging.getLogger(__name__)

ACTOR = "adaptive"
SAMPLE = 200
"""Waiting requests that one look reads."""


class Adaptation:
    """Remembers, from look to look, what each model's queue showed."""

    def __init__(self, client: redis.Redis, keys: Keys, clock: Callable[[], float] = time.time) -> None:
        self._client = client
        self._keys = keys
        self._clock = clock
        self._states: dict[str, AdaptiveState] = {}

    def run_once(self, announce: Announce | None = None) -> int:
        """Look at every queue whose newest revision is `adaptive`; how many were switched.

        An ordinary switch, by the actor `adaptive`, that gives way to an operator's which comes first.
        """
        applied = PolicyRevision.State.APPLIED
        rows = [row for row in newest_revisions() if row.name == "adaptive" and row.state == applied]
        self._states = {row.model: self._states[row.model] for row in rows if row.model in self._states}
        return sum(self._look(row, announce) for row in rows)

    def _look(self, row: PolicyRevision, announce: Announce | None) -> bool:
        queue, now = FleetQueue(self._keys, row.model), self._clock()
        params = build_policy(row.name, row.params).params
        snapshot, sample = execute_many(self._client, [queue.snapshot(), queue.sample(SAMPLE)])
        if snapshot.revision != row.revision:
            return False
        conditions = observe(sample, snapshot.depth, now, _deadlines(params))
        state, choice = choose(self._state(row), conditions, current=params["current"], params=params, now=now)
        self._states[row.model] = state
        if choice is None:
            return False
        try:
            switch_policy(
                model=row.model,
                name=row.name,
                params={**row.params, "current": choice.policy},
                actor_name=ACTOR,
                reason=choice.reason,
                announce=announce,
                after=row.revision,
                client=self._client,
                keys=self._keys,
            )
        except StaleRevision:
            logger.info("An operator switched %s first.", row.model)
            return False
        return True

    def _state(self, row: PolicyRevision) -> AdaptiveState:
        """What was remembered; the time of the last switch is the database's, so that a restart forgets no dwell."""
        switched_s = (row.applied_at or row.created_at).timestamp()
        return replace(self._states.get(row.model) or AdaptiveState(switched_s=0.0), switched_s=switched_s)


def _deadlines(params: Mapping[str, Any]) -> Callable[[QueueEntry], float]:
    """A request's own deadline, or its arrival and the end-to-end target of its tenant and priority, or of `params`."""
    levels = find_service_levels()

    def deadline(entry: QueueEntry) -> float:
        level = levels.get((entry.tenant, entry.priority)) or levels.get(("", entry.priority))
        if entry.deadline_s is not None or level is None or level.e2e_ms is None:
            return deadline_of(entry, params)
        return entry.arrival_s + level.e2e_ms / 1000

    return deadline
