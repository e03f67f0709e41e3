"""A mailbox gives each token's text once, whatever arrives twice, out of turn or from an older attempt."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from inference.gateway.errors import RequestLost
from inference.gateway.replies import Mailbox
from inference.messages import Finish, SequenceUpdate

TEXTS = [f"<{i}>" for i in range(40)]


def update(start: int, end: int, *, attempt: int = 1, finish: Finish | None = None) -> SequenceUpdate:
    return SequenceUpdate("r", attempt, start, list(range(start, end)), TEXTS[start:end], finish)


def test_tokens_that_are_there_already_are_dropped() -> None:
    mailbox = Mailbox(0.0)
    assert mailbox.put(update(0, 3), 0.0)
    assert mailbox.put(update(0, 5, attempt=2), 0.0)
    assert mailbox.put(update(2, 4, attempt=2), 0.0)
    assert mailbox.take(0.0) == "".join(TEXTS[:5])
    assert mailbox.num_tokens == 5


def test_a_gap_is_refused_and_filled_by_a_resend_from_the_start() -> None:
    mailbox = Mailbox(0.0)
    mailbox.put(update(0, 2), 0.0)
    assert not mailbox.put(update(3, 4), 0.0)
    assert mailbox.put(update(0, 4), 0.0)
    assert mailbox.take(0.0) == "".join(TEXTS[:4])


def test_an_attempt_that_was_replaced_is_not_heard() -> None:
    mailbox = Mailbox(0.0)
    mailbox.put(update(0, 1, attempt=2), 0.0)
    assert mailbox.put(update(1, 2, attempt=1, finish=Finish("error", 1, 2)), 0.0)
    assert mailbox.finish is None
    assert mailbox.num_tokens == 1


def test_nothing_is_added_after_the_end() -> None:
    mailbox = Mailbox(0.0)
    mailbox.put(update(0, 2, finish=Finish("stop", 1, 2, "held")), 0.0)
    mailbox.put(update(0, 9, attempt=2), 0.0)
    mailbox.fail(RequestLost())
    assert mailbox.take(0.0) == "<0><1>held"
    assert mailbox.error is None


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 4)), max_size=40))
def test_any_order_of_updates_gives_a_prefix_of_the_text(updates: list[tuple[int, int, int]]) -> None:
    mailbox, text = Mailbox(0.0), ""
    for start, end, attempt in updates:
        mailbox.put(update(start, max(start, end), attempt=attempt), 0.0)
        text += mailbox.take(0.0)
    assert text == "".join(TEXTS[: mailbox.num_tokens])


def test_what_a_repair_finds_nothing_new_in_is_heard_and_not_shown() -> None:
    mailbox = Mailbox(0.0)
    mailbox.put(update(0, 2), 1.0)
    assert mailbox.take(1.5)
    mailbox.put(update(0, 2), 5.0)
    assert (mailbox.heard_s, mailbox.shown_s) == (5.0, 1.5)


async def test_a_waiting_client_wakes_for_text() -> None:
    mailbox = Mailbox(0.0)
    waiter = asyncio.create_task(mailbox.wait())
    await asyncio.sleep(0)
    assert not waiter.done()
    mailbox.put(update(0, 1), 0.0)
    await asyncio.wait_for(waiter, 60)


async def test_a_client_of_the_whole_answer_wakes_at_its_end_only() -> None:
    mailbox = Mailbox(0.0)
    mailbox.whole = True
    waiter = asyncio.create_task(mailbox.wait())
    await asyncio.sleep(0)
    mailbox.put(update(0, 1), 0.0)
    await asyncio.sleep(0)
    assert not waiter.done()
    mailbox.put(update(1, 2, finish=Finish("stop", 1, 2)), 0.0)
    await asyncio.wait_for(waiter, 60)
    assert mailbox.take(0.0) == "<0><1>"
