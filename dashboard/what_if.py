"""What-if: an operator asks for a replay of recorded traffic; the ops worker runs it in a process of its own."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from django.contrib.auth.models import User
from django.db import DatabaseError, connection, transaction
from django.utils import timezone

from dashboard.models import WhatIfRun
from inference.recorded import HistoryError, read_window
from inference.what_if import Candidate, run_what_if
from scheduling.audit import record_action
from scheduling.core.policies import POLICIES, PolicyError, build_policy
from scheduling.models import ConfigVersion

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 8
MAX_WINDOW = timedelta(hours=6)
LOST_AFTER_S = 60.0
"""A replay that was silent for so long has died: beside its progress it gives a sign of life every PULSE_S."""
PULSE_S = 5.0
TELL_EVERY_S = 0.3
State = WhatIfRun.State
OPEN = (State.QUEUED, State.RUNNING)


class WhatIfError(ValueError):
    """The replay cannot be asked for; the message says why."""


@transaction.atomic
def ask_what_if(
    *, model: str, start: datetime, end: datetime, candidates: Sequence[Mapping[str, Any]], actor: User
) -> WhatIfRun:
    """Write down a replay, in the audit trail too; the caller has it run. Raises WhatIfError or PolicyError."""
    if not 1 <= len(candidates) <= MAX_CANDIDATES:
        raise WhatIfError(f"Choose one to {MAX_CANDIDATES} policies.")
    if not timedelta(0) < end - start <= MAX_WINDOW:
        raise WhatIfError(
            f"A window is at most {MAX_WINDOW.total_seconds() / 3600:.0f} hours long, and ends after it begins."
        )
    ConfigVersion.objects.get_or_create(id=1)
    ConfigVersion.objects.select_for_update().get(id=1)  # else two who ask at once are both the only one
    end_lost_runs()
    if WhatIfRun.objects.filter(state__in=OPEN).exists():
        raise WhatIfError("Another replay is under way; wait until it has ended.")
    tried = []
    for candidate in candidates:
        policy = build_policy(candidate["policy"], candidate.get("params") or {})
        tried.append({"policy": policy.name, "params": dict(policy.params)})
    after = {"start": start, "end": end, "candidates": tried}
    record_action(actor=actor, action="what_if.ask", target=model, after=after)
    return WhatIfRun.objects.create(
        model=model, start=start, end=end, candidates=tried, actor_name=actor.get_username()
    )


def replay(run_id: int) -> None:
    """Run a queued replay and write down its result, or in a sentence why there is none."""
    if not WhatIfRun.objects.filter(pk=run_id, state=State.QUEUED).update(
        state=State.RUNNING, updated_at=timezone.now(), under_way="reading the history"
    ):
        return
    run = WhatIfRun.objects.get(pk=run_id)
    with pulse(run_id):
        _replay(run)


def _replay(run: WhatIfRun) -> None:
    run_id = run.pk
    try:
        recorded = read_window(run.model, start=run.start, end=run.end)
        candidates = [
            Candidate(policy=one["policy"], params=one["params"], label=_label(one["policy"], one["params"]))
            for one in run.candidates
        ]
        result = run_what_if(recorded, candidates, progress=_Telling(run_id))
    except (HistoryError, PolicyError) as error:
        _finish(run_id, state=State.FAILED, error=str(error))
    except Exception:
        logger.exception("What-if %d failed", run_id)
        _finish(run_id, state=State.FAILED, error="The replay failed; the log of the ops worker says why.")
    else:
        _finish(run_id, state=State.DONE, result=result, progress=1.0)


def _label(policy: str, params: Mapping[str, Any]) -> str:
    """The policy, with those of its parameters that are not at their defaults."""
    changed = {name: value for name, value in params.items() if value != POLICIES[policy].params[name]}
    return ", ".join(
        [
            policy,
            *(
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in changed.items()
            ),
        ]
    )


def end_lost_runs() -> int:
    """Mark replays whose process died as failed; how many."""
    lost = WhatIfRun.objects.filter(state__in=OPEN, updated_at__lt=timezone.now() - timedelta(seconds=LOST_AFTER_S))
    return lost.update(
        state=State.FAILED, error="The replay was interrupted. Ask for it again.", finished_at=timezone.now()
    )


@contextmanager
def pulse(run_id: int, period_s: float = PULSE_S) -> Iterator[None]:
    """Signs of life of a replay while it says nothing: to read an hour and learn from it may take a while."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(period_s):
            try:
                WhatIfRun.objects.filter(pk=run_id, state=State.RUNNING).update(updated_at=timezone.now())
            except DatabaseError as error:
                logger.warning("What-if %d gives no sign of life for now: %s", run_id, error)
            finally:
                connection.close()  # this thread's own

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Telling:
    """Writes progress into the row, a few times a second at most."""

    def __init__(self, run_id: int) -> None:
        self._run_id = run_id
        self._told_s = 0.0

    def __call__(self, share: float, label: str) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s < TELL_EVERY_S:
            return
        self._told_s = now_s
        WhatIfRun.objects.filter(pk=self._run_id).update(
            progress=round(share, 3), under_way=label[:100], updated_at=timezone.now()
        )


def _finish(run_id: int, **values: Any) -> None:
    now = timezone.now()
    WhatIfRun.objects.filter(pk=run_id).update(under_way="", updated_at=now, finished_at=now, **values)
