"""A request's course on its worker, as moments and phases: begun, prefilled, preempted, resumed, tokens in bursts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from dashboard.wording import duration

Mark = tuple[int, str, int]
"""(ms after the arrival, kind, output tokens by then), see `inference.messages.Mark`."""
Burst = tuple[int, int]
"""(ms after the arrival, output tokens) of a span."""
LOST = {
    "preempted": ("Preempted", "Its KV blocks were needed for requests of more right"),
    "displaced": ("Preempted", "A request of higher priority took its slot"),
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
class Course:
    """What is known of one attempt. `end` is the request's end, or now."""

    arrived: datetime
    claimed: datetime | None
    first_token: datetime | None
    end: datetime
    marks: Sequence[Mark] = ()
    bursts: Sequence[Burst] = ()
    span_ms: int = 0
    """Length of a span of tokens."""

    @classmethod
    def of(cls, timeline: Mapping[str, Any], **moments: Any) -> "Course":
        """With the marks and tokens of a recorded timeline; an older record has none."""
        marks = [(int(ms), str(kind), int(tokens)) for ms, kind, tokens in timeline.get("marks", [])]
        bursts = [(int(ms), int(num)) for ms, num in timeline.get("tokens", [])]
        return cls(marks=marks, bursts=bursts, span_ms=int(timeline.get("span_ms", 0)), **moments)

    def at(self, ms: int) -> datetime:
        """The moment so many milliseconds after the arrival."""
        return self.arrived + timedelta(milliseconds=ms)

    @property
    def first_ms(self) -> float:
        """The first token, in milliseconds after the arrival; 0 where there is none."""
        return 0.0 if self.first_token is None else 1000 * (self.first_token - self.arrived).total_seconds()

    @property
    def started(self) -> datetime | None:
        """When its prompt began to be computed."""
        return next((self.at(ms) for ms, kind, _ in self.marks if kind == "started"), self.claimed)


def make_event(kind: str, title: str, when: datetime | None, arrived: datetime, details: Sequence[str]) -> Event:
    """An event with those of the details that say something."""
    after_s = None if when is None else (when - arrived).total_seconds()
    return Event(kind=kind, title=title, when=when, after_s=after_s, details=[text for text in details if text])


def list_turns(course: Course) -> list[Event]:
    """What the worker noted, in order: its beginning, preemptions, resumptions and bursts of tokens."""
    events = [_turn(course, number) for number in range(len(course.marks))]
    return sorted(events + _burst_events(course), key=lambda event: event.after_s or 0.0)


def list_phases(course: Course) -> list[tuple[str, float]]:
    """(name, seconds) in order, from the arrival to the end without a gap."""
    first = course.first_token
    turns = [(course.arrived, "queued")]
    if course.claimed:
        turns.append((course.claimed, "ready" if course.marks else "prefill"))
    for ms, kind, _ in course.marks:
        when = course.at(ms)
        computes = "decode" if first and when >= first else "prefill"
        turns.append((when, "preempted" if kind in LOST else computes))
    if first:
        turns.append((first, "decode"))
    turns.sort(key=lambda turn: turn[0])
    ends = [when for when, _ in turns[1:]] + [course.end]
    spans = [(name, (end - when).total_seconds()) for (when, name), end in zip(turns, ends, strict=True)]
    return [(name, seconds) for name, seconds in spans if seconds > 0]


def say_span(later: datetime, earlier: datetime) -> str:
    """A time between two moments."""
    return duration(max(0.0, (later - earlier).total_seconds()))


def _turn(course: Course, number: int) -> Event:
    ms, kind, tokens = course.marks[number]
    when = course.at(ms)
    if kind in LOST:
        title, why = LOST[kind]
        return make_event("lost", title, when, course.arrived, [f"{why}, after {tokens} output tokens."])
    if kind == "resumed":
        before = course.at(course.marks[number - 1][0]) if number else when
        return make_event("resumed", "Resumed", when, course.arrived, [f"After {say_span(when, before)}."])
    held = f"It had waited {say_span(when, course.claimed)} in its worker." if course.claimed else ""
    return make_event("started", "Prefill began", when, course.arrived, [held])


def _burst_events(course: Course) -> list[Event]:
    """Spans that follow each other without a pause are one burst."""
    groups: list[list[Burst]] = []
    for burst in course.bursts:
        if groups and burst[0] - groups[-1][-1][0] <= course.span_ms:
            groups[-1].append(burst)
        else:
            groups.append([burst])
    events, before_ms = [], None
    for group in groups:
        num, first_ms, last_ms = sum(n for _, n in group), group[0][0], group[-1][0] + course.span_ms
        began = max(course.at(first_ms), course.first_token or course.arrived)
        took_s = (min(course.at(last_ms), course.end) - began).total_seconds()
        pace = f"{num / took_s:,.0f} tokens/s." if num > 1 and took_s > 0.01 else ""
        pause = "" if before_ms is None else f"After a pause of {duration((first_ms - before_ms) / 1000)}."
        events.append(make_event("tokens", _count(num), began, course.arrived, [pause, pace]))
        before_ms = last_ms
    return events


def _count(num: int) -> str:
    return f"{num} token{'' if num == 1 else 's'}"
