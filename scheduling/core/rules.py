"""What a policy asks of the queue beyond the placement of each request: prices, promotion, lateness, runs."""

from dataclasses import dataclass
from math import inf

MAX_SHED = 16
"""Waiting requests that are dropped for one newcomer at most."""

MAX_EXPIRED = 100
"""Requests past their deadline that one call drops. A claim that finds more drops these and serves nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRules:
    """Stored with the active policy and applied at claims and ends, in both queues alike."""

    promote_after_s: float | None = None
    """Whoever arrived this long ago is next, the oldest first, whatever its flow; its flow is charged as ever."""

    late_slack_s: float | None = None
    """Ranks are deadlines: one that is nearer than this is late, and goes after all of its flow that are not."""

    request_price: float = 0.0
    prompt_price: float = 1.0
    """What a flow is charged per request, per prompt token and per output token."""
    output_price: float = 1.0

    run: int = 1
    """Requests that one claim takes from a flow in a row before another flow has its turn."""

    preempts: bool = False
    """Higher levels outrank lower ones: an engine without a free slot may claim one that takes a lower one's slot."""

    @property
    def reorders(self) -> bool:
        """Whether anything but the flows and ranks says who is next."""
        return self.promote_after_s is not None or self.late_slack_s is not None or self.run > 1

    def late_before(self, now: float) -> float:
        """The rank below which a request is late."""
        return -inf if self.late_slack_s is None else now + self.late_slack_s

    def charge(self, prompt_tokens: int, output_tokens: int) -> float:
        """The price of a request."""
        return self.request_price + self.prompt_price * prompt_tokens + self.output_price * output_tokens

    def charge_used(self, prompt_tokens: int, used_tokens: int) -> float:
        """The price of what was used: the prompt as far as it was computed, then output."""
        return self.charge(min(used_tokens, prompt_tokens), max(0, used_tokens - prompt_tokens))


PLAIN = QueueRules()
"""No rules: a charge is the number of tokens."""
