"""What a batcher is told of a request, checked before it waits beside others."""

import math

from scheduling.core.batching.errors import BatcherRequestError
from scheduling.core.request import Priority


def check_request(priority: int, tokens: int, deadline_s: float | None, share: float) -> None:
    """Raises BatcherRequestError for what would take others their turns."""
    if not Priority.CRITICAL <= priority <= Priority.BULK:
        raise BatcherRequestError(f"A priority is a number from 0 (critical) to 5 (bulk), not {priority!r}.")
    if not 0 <= tokens < math.inf:
        raise BatcherRequestError(f"A request is expected to cost 0 tokens or more, not {tokens!r}.")
    if not 0 < share < math.inf:
        raise BatcherRequestError(f"A share is a number above 0, not {share!r}.")
    if deadline_s is not None and not math.isfinite(deadline_s):
        raise BatcherRequestError(f"A deadline is a time of the batcher's clock, not {deadline_s!r}.")
