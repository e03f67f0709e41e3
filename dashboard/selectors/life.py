"""One request's life as a timeline, whether it has ended or not."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from dashboard.selectors.requests import find_request
from dashboard.selectors.waiting import Held, explain_wait, find_held
from inference.messages import Finish
from inference.models import RequestRecord
from scheduling.core.request import Priority
from scheduling.models import ServiceLevel
from scheduling.selectors import find_service_levels

ENDS = {
    "stop": "It came to its natural end.",
    "length": "It reached its most tokens.",
    "cancelled": "It was cancelled.",
    "error": "It failed.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A moment of a life; `after_s` counts from the arrival. `kind` chooses the sign."""

    kind: str
    title: str
    when: datetime | None = None
    after_s: float | None = None
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A request from its arrival to its end, or to now."""

    id: str
    model: str
    tenant: str
    priority: int
    endpoint: str
    state: str
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int
    attempts: int
    events: list[Event]
    phases: list[tuple[str, float]]
    """(name, seconds) of queueing, prefilling and decoding, as far as it came."""
    ended: bool
    replica: str = ""
    user: str = ""
    error_code: str = ""

    @property
    def priority_name(self) -> str:
        return Priority(self.priority).name.lower()

    @property
    def total_s(self) -> float:
        """All phases together."""
        return sum(seconds for _, seconds in self.phases)

    @property
    def bars(self) -> list[dict[str, str]]:
        """The phases as parts of 100, for a picture."""
        at, bars = 0.0, []
        for name, seconds in self.phases:
            width = 100 * seconds / self.total_s if self.total_s else 0.0
            bars.append({"name": name, "at": f"{at:.2f}", "width": f"{width:.2f}"})
            at += width
        return bars


def find_life(request_id: str, models: Sequence[str]) -> Life | None:
    """From the history, else from the queue's store; None where neither knows it. Raises RedisError or OSError."""
    request_id = request_id.replace("\0", "")[:64]
    record = find_request(request_id)
    if record is not None:
        return _of_record(record)
    held = find_held(request_id, models)
    return None if held is None else _of_held(held)


def _of_record(row: RequestRecord) -> Life:
    marks = [("queued", row.claimed_at), ("prefill", row.first_token_at), ("decode", row.finished_at)]
    phases, last = [], row.arrived_at
    for name, when in marks:
        if when is not None:
            phases.append((name if row.claimed_at else "queued", max(0.0, (when - last).total_seconds())))
            last = when
    return Life(
        id=row.request_id,
        model=row.model,
        tenant=row.tenant,
        priority=row.priority,
        endpoint=row.endpoint,
        state=row.state,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        max_tokens=row.max_tokens,
        attempts=row.attempts,
        replica=row.replica,
        user=row.user,
        error_code=row.error_code,
        events=_events(row),
        phases=phases,
        ended=True,
    )


def _events(row: RequestRecord) -> list[Event]:
    level = find_service_levels()
    target = level.get((row.tenant, row.priority)) or level.get(("", row.priority))
    events = [_admitted(row.arrived_at, row.prompt_tokens, row.max_tokens, row.deadline_at)]
    if row.claimed_at:
        policy = f"Ordered by {row.policy}, revision {row.policy_revision}." if row.policy else ""
        again = f"It was taken up {row.attempts} times: a worker before was lost." if row.attempts > 1 else ""
        details = [f"It had waited {_span(row.claimed_at, row.arrived_at)}.", policy, again]
        events.append(_event("claimed", f"Claimed by {row.replica}", row.claimed_at, row.arrived_at, details))
    if row.first_token_at:
        verdict = _verdict(row.ttft_s, target.ttft_ms if target else None)
        details = [f"Time to first token {_span(row.first_token_at, row.arrived_at)}{verdict}."]
        events.append(_event("first", "First token", row.first_token_at, row.arrived_at, details))
    events.append(_event("end", row.state.capitalize(), row.finished_at, row.arrived_at, _end_details(row, target)))
    return events


def _end_details(row: RequestRecord, target: ServiceLevel | None) -> list[str]:
    details = [ENDS.get(row.finish_reason, row.finish_reason)]
    if row.error_code:
        details.append(f"Code {row.error_code}.")
    if row.completion_tokens:
        pace = ""
        if row.first_token_at and row.completion_tokens > 1:
            each_ms = (row.finished_at - row.first_token_at).total_seconds() * 1000 / (row.completion_tokens - 1)
            pace = f", one every {each_ms:.0f} ms"
        details.append(f"{row.completion_tokens} of at most {row.max_tokens} tokens{pace}.")
    verdict = _verdict(row.e2e_s, target.e2e_ms if target else None)
    details.append(f"End to end {_span(row.finished_at, row.arrived_at)}{verdict}.")
    return details


def _of_held(held: Held) -> Life:
    request, record = held.request, held.record
    arrived, now = datetime.fromtimestamp(request.arrival_s, UTC), datetime.now(UTC)
    deadline = None if request.deadline_s is None else datetime.fromtimestamp(request.deadline_s, UTC)
    events = [_admitted(arrived, len(request.prompt_token_ids), request.max_tokens, deadline)]
    tokens, code, ended = record.num_tokens, "", record.finish is not None or record.state == "cancelled"
    if record.finish is not None:
        finish = msgspec.msgpack.decode(record.finish, type=Finish)
        tokens, code = finish.completion_tokens, finish.error_code
        details = [ENDS.get(finish.reason, ""), finish.error_message, "The historian writes its times in a moment."]
        events.append(_event("end", record.state.capitalize(), None, arrived, details))
    elif record.state == "queued":
        events.append(_event("queued", "Waiting", now, arrived, explain_wait(held)))
    elif record.state == "running":
        again = f"This is attempt {record.attempt}: a worker before was lost." if record.attempt > 1 else ""
        where = f"On {held.replica}." if held.replica else "A worker has claimed it."
        details = [where, f"{tokens} of at most {request.max_tokens} tokens.", again]
        events.append(_event("running", "Running", now, arrived, details))
    else:
        events.append(_event("end", record.state.capitalize(), None, arrived, []))
    return Life(
        id=request.id,
        model=request.model,
        tenant=request.tenant,
        priority=request.priority,
        endpoint=request.endpoint,
        state=record.state,
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=tokens,
        max_tokens=request.max_tokens,
        attempts=record.attempt,
        replica=held.replica,
        user=request.user,
        error_code=code,
        events=events,
        phases=[("queued", (now - arrived).total_seconds())] if record.state == "queued" else [],
        ended=ended,
    )


def _admitted(when: datetime, prompt_tokens: int, max_tokens: int, deadline: datetime | None) -> Event:
    details = [f"{prompt_tokens} prompt tokens, at most {max_tokens} to come."]
    if deadline is not None:
        details.append(f"Its deadline is {_span(deadline, when)} after that.")
    return Event(kind="admitted", title="Admitted", when=when, after_s=0.0, details=details)


def _event(kind: str, title: str, when: datetime | None, arrived: datetime, details: list[str]) -> Event:
    after_s = None if when is None else (when - arrived).total_seconds()
    return Event(kind=kind, title=title, when=when, after_s=after_s, details=[text for text in details if text])


def _span(later: datetime, earlier: datetime) -> str:
    seconds = (later - earlier).total_seconds()
    return f"{seconds * 1000:.0f} ms" if abs(seconds) < 1 else f"{seconds:.1f} s"


def _verdict(took_s: float | None, target_ms: int | None) -> str:
    if took_s is None or target_ms is None:
        return ""
    return f", {'within' if took_s * 1000 <= target_ms else 'over'} the target of {target_ms} ms"
