"""What happened to a request on its worker: when it began, lost its place, went on, and when its tokens came."""

from inference.messages import MAX_BURSTS, MAX_MARKS, Mark, MarkKind

FIRST_SPAN_MS = 50
"""Length of a span of tokens at first; it doubles whenever there are too many spans."""


class Timeline:
    """Of one attempt. Its memory is bounded, and a token costs well under a microsecond."""

    __slots__ = ("_arrival_s", "_counts", "marks", "span_ms")

    def __init__(self, arrival_s: float) -> None:
        self._arrival_s = arrival_s
        self.span_ms = FIRST_SPAN_MS
        self._counts: dict[int, int] = {}
        """Number of a span since the arrival -> tokens in it."""
        self.marks: list[Mark] = []

    def mark(self, kind: MarkKind, now_s: float, num_tokens: int) -> None:
        """Note a turn; beyond MAX_MARKS the latest stands in the last place."""
        mark = Mark(self.since_ms(now_s), kind, num_tokens)
        if len(self.marks) == MAX_MARKS:
            self.marks[-1] = mark
        else:
            self.marks.append(mark)

    def count_token(self, now_s: float) -> None:
        """Note an output token."""
        span = self.since_ms(now_s) // self.span_ms
        self._counts[span] = self._counts.get(span, 0) + 1
        while len(self._counts) > MAX_BURSTS:
            self.span_ms *= 2
            merged: dict[int, int] = {}
            for number, num in self._counts.items():
                merged[number // 2] = merged.get(number // 2, 0) + num
            self._counts = merged

    def bursts(self) -> list[tuple[int, int]]:
        """(ms after the arrival, output tokens) of each span that had any, in order."""
        return [(number * self.span_ms, num) for number, num in self._counts.items()]

    def since_ms(self, now_s: float) -> int:
        """A time, in ms after the arrival."""
        return max(0, round(1000 * (now_s - self._arrival_s)))
