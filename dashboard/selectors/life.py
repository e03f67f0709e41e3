"""One request's life as a timeline, whether it has ended or not."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec

from dashboard.rollups import find_level
from dashboard.selectors.course import LOST, Course, Event, list_phases, list_turns, make_event, say_span
from dashboard.selectors.requests import find_request
from dashboard.selectors.waited import explain_waited
from dashboard.selectors.waiting import Held, explain_wait, find_held
from dashboard.wording import duration
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
    course: Course | None = None
    """What its worker noted; None while it waits."""

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

    @property
    def sums(self) -> list[tuple[str, float]]:
        """Seconds of each phase, those of one name together."""
        sums: dict[str, float] = {}
        for name, seconds in self.phases:
            sums[name] = sums.get(name, 0.0) + seconds
        return list(sums.items())

    @property
    def bursts(self) -> list[dict[str, str]]:
        """Tokens over time as columns above the same axis: place and width of 100, height of 20."""
        if self.course is None or not self.course.bursts or not self.total_s:
            return []
        total_ms, most = 1000 * self.total_s, max(num for _, num in self.course.bursts)
        bursts = []
        for ms, num in self.course.bursts:
            start = 100 * max(ms, self.course.first_ms) / total_ms
            end = min(100.0, 100 * (ms + self.course.span_ms) / total_ms)
            height = 20 * num / most
            place = {"at": start, "width": max(0.3, end - start - 0.15), "top": 20 - height, "height": height}
            bursts.append({**{name: f"{value:.2f}" for name, value in place.items()}, "num": str(num)})
        return bursts


def find_life(request_id: str, models: Sequence[str]) -> Life | None:
    """From the history, else from the queue's store; None where neither knows it. Raises RedisError or OSError."""
    request_id = request_id.replace("\0", "")[:64]
    record = find_request(request_id)
    if record is not None:
        return _of_record(record)
    held = find_held(request_id, models)
    return None if held is None else _of_held(held)


def _of_record(row: RequestRecord) -> Life:
    course = Course.of(
        row.timeline,
        arrived=row.arrived_at,
        claimed=row.claimed_at,
        first_token=row.first_token_at,
        end=row.finished_at,
    )
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
        events=_events(row, course),
        phases=list_phases(course),
        ended=True,
        course=course,
    )


def _events(row: RequestRecord, course: Course) -> list[Event]:
    target = find_level(find_service_levels(), row.tenant, row.priority)
    events = [_admitted(row.arrived_at, row.prompt_tokens, row.max_tokens, row.deadline_at)]
    events.append(make_event("queued", "Queued", row.arrived_at, row.arrived_at, explain_waited(row)))
    if row.claimed_at:
        policy = f"Ordered by {row.policy}, revision {row.policy_revision}." if row.policy else ""
        again = f"It was taken up {row.attempts} times: a worker before was lost." if row.attempts > 1 else ""
        details = [f"It had waited {say_span(row.claimed_at, row.arrived_at)}.", policy, again]
        events.append(make_event("claimed", f"Claimed by {row.replica}", row.claimed_at, row.arrived_at, details))
    turns = list_turns(course)
    if row.first_token_at:
        turns.append(_prefilled(course, row.first_token_at, row.prompt_tokens, target))
    events += sorted(turns, key=lambda event: (event.after_s or 0.0, event.kind == "tokens"))
    events.append(make_event("end", row.state.capitalize(), row.finished_at, row.arrived_at, _end_details(row, target)))
    return events


def _prefilled(course: Course, when: datetime, prompt_tokens: int, target: ServiceLevel | None) -> Event:
    verdict = _verdict((when - course.arrived).total_seconds(), target.ttft_ms if target else None)
    took = f"Its {prompt_tokens} prompt tokens took {say_span(when, course.started)}." if course.started else ""
    details = [f"Time to first token {say_span(when, course.arrived)}{verdict}.", took]
    return make_event("first", "Prefilled, first token", when, course.arrived, details)


def _end_details(row: RequestRecord, target: ServiceLevel | None) -> list[str]:
    details = [ENDS.get(row.finish_reason, row.finish_reason)]
    if row.error_code:
        details.append(f"Code {row.error_code}.")
    if row.completion_tokens:
        pace = ""
        if row.tpot_s is not None:
            pace = f", one every {duration(row.tpot_s)}{_verdict(row.tpot_s, target.tpot_ms if target else None)}"
        details.append(f"{row.completion_tokens} of at most {row.max_tokens} tokens{pace}.")
    verdict = _verdict(row.e2e_s, target.e2e_ms if target else None)
    details.append(f"End to end {say_span(row.finished_at, row.arrived_at)}{verdict}.")
    return details


def _of_held(held: Held) -> Life:
    request, record = held.request, held.record
    arrived, now = datetime.fromtimestamp(request.arrival_s, UTC), datetime.now(UTC)
    deadline = None if request.deadline_s is None else datetime.fromtimestamp(request.deadline_s, UTC)
    events = [_admitted(arrived, request.num_prompt_tokens, request.max_tokens, deadline)]
    course = Course(arrived=arrived, claimed=None, first_token=None, end=now) if record.state == "queued" else None
    tokens, code, ended = record.num_tokens, "", record.finish is not None or record.state == "cancelled"
    if record.finish is not None:
        finish = msgspec.msgpack.decode(record.finish, type=Finish)
        tokens, code = finish.completion_tokens, finish.error_code
        details = [ENDS.get(finish.reason, ""), finish.error_message, "The historian writes its times in a moment."]
        events.append(make_event("end", record.state.capitalize(), None, arrived, details))
    elif record.state == "queued":
        events.append(make_event("queued", "Waiting", now, arrived, explain_wait(held)))
    elif record.state == "running":
        course = _running_course(held, arrived, now)
        events += _running_events(held, course)
        tokens = held.running[1].output_tokens if held.running else tokens
    else:
        events.append(make_event("end", record.state.capitalize(), None, arrived, []))
    return Life(
        id=request.id,
        model=request.model,
        tenant=request.tenant,
        priority=request.priority,
        endpoint=request.endpoint,
        state=record.state,
        prompt_tokens=request.num_prompt_tokens,
        completion_tokens=tokens,
        max_tokens=request.max_tokens,
        attempts=record.attempt,
        replica=held.replica,
        user=request.user,
        error_code=code,
        events=events,
        phases=list_phases(course) if course else [],
        ended=ended,
        course=course,
    )


def _running_course(held: Held, arrived: datetime, now: datetime) -> Course | None:
    """What its worker says of it; None where it has not named it yet."""
    if held.running is None:
        return None
    slot = held.running[1]
    first = None if slot.first_token_ms is None else arrived + timedelta(milliseconds=slot.first_token_ms)
    return Course(
        arrived=arrived,
        claimed=arrived + timedelta(milliseconds=slot.claimed_ms),
        first_token=first,
        end=now,
        marks=[(mark.ms, mark.kind, mark.tokens) for mark in slot.marks],
    )


def _running_events(held: Held, course: Course | None) -> list[Event]:
    request, record = held.request, held.record
    arrived = datetime.fromtimestamp(request.arrival_s, UTC)
    again = f"This is attempt {record.attempt}: a worker before was lost." if record.attempt > 1 else ""
    if course is None or held.running is None:
        return [make_event("running", "Running", None, arrived, ["A worker has claimed it.", again])]
    replica, slot = held.running
    waited = f"It had waited {say_span(course.claimed, arrived)}." if course.claimed else ""
    events = [make_event("claimed", f"Claimed by {replica}", course.claimed, arrived, [waited, again])]
    turns = list_turns(course)
    if course.first_token is not None:
        target = find_level(find_service_levels(), request.tenant, request.priority)
        turns.append(_prefilled(course, course.first_token, slot.prompt_tokens, target))
    events += sorted(turns, key=lambda event: event.after_s or 0.0)
    stands = bool(slot.marks) and slot.marks[-1].kind in LOST
    state = "Waits in its worker for a place" if stands or not slot.marks else "Running"
    told = f"{slot.output_tokens} of at most {request.max_tokens} tokens."
    return [*events, make_event("running", state, course.end, arrived, [told])]


def _admitted(when: datetime, prompt_tokens: int, max_tokens: int, deadline: datetime | None) -> Event:
    details = [f"{prompt_tokens} prompt tokens, at most {max_tokens} to come."]
    if deadline is not None:
        details.append(f"Its deadline is {say_span(deadline, when)} after that.")
    return Event(kind="admitted", title="Admitted", when=when, after_s=0.0, details=details)


def _verdict(took_s: float | None, target_ms: int | None) -> str:
    if took_s is None or target_ms is None:
        return ""
    return f", {'within' if took_s * 1000 <= target_ms else 'over'} the target of {duration(target_ms / 1000)}"
