"""How fast a queue drains, told from looks at it."""

import pytest

from scheduling.core.answers import QueueSnapshot
from scheduling.core.drain import EVIDENCE_S, UNSERVED_S, BacklogRate

LOOK_S = 0.25


def look(*, depth: int = 10, tokens: int = 0) -> QueueSnapshot:
    return QueueSnapshot(depth=depth, claimed_total=tokens, claimed_tokens_total=tokens)


def watch(backlog: BacklogRate, *, begin_s: float, for_s: float, tokens_per_s: float, serving: bool = True) -> float:
    num = round(for_s / LOOK_S)
    for i in range(num + 1):
        tokens = int(tokens_per_s * (begin_s + i * LOOK_S))
        backlog.observe(look(tokens=tokens), begin_s + i * LOOK_S, serving=serving)
    return begin_s + num * LOOK_S


def test_a_wait_is_told_by_the_tokens_that_drain() -> None:
    backlog = BacklogRate()
    watch(backlog, begin_s=0.0, for_s=10.0, tokens_per_s=100.0)
    assert backlog.wait_s(500) == pytest.approx(5.0)
    assert backlog.wait_s(0) == 0


def test_two_looks_are_no_measure() -> None:
    backlog = BacklogRate()
    watch(backlog, begin_s=0.0, for_s=EVIDENCE_S / 2, tokens_per_s=4.0)
    assert backlog.wait_s(500) is None
    assert backlog.wait_s(0) == 0


def test_an_idle_queue_does_not_look_slow() -> None:
    backlog = BacklogRate()
    end_s = watch(backlog, begin_s=0.0, for_s=10.0, tokens_per_s=100.0)
    backlog.observe(look(depth=0, tokens=1000), end_s + 1)
    backlog.observe(look(depth=0, tokens=1000), end_s + 60)
    assert backlog.wait_s(500) == pytest.approx(5.0)


def test_how_fast_it_was_counts_while_a_worker_restarts_and_not_where_nobody_serves() -> None:
    backlog = BacklogRate()
    end_s = watch(backlog, begin_s=0.0, for_s=10.0, tokens_per_s=4.0)
    end_s = watch(backlog, begin_s=end_s, for_s=UNSERVED_S / 2, tokens_per_s=0.0, serving=False)
    assert backlog.wait_s(200) == pytest.approx(50.0)
    watch(backlog, begin_s=end_s, for_s=UNSERVED_S, tokens_per_s=0.0, serving=False)
    assert backlog.wait_s(200) is None
    watch(backlog, begin_s=100.0, for_s=LOOK_S, tokens_per_s=4.0)
    assert backlog.wait_s(200) == pytest.approx(50.0, rel=0.1)
