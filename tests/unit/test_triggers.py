"""Triggers: each fires for its cause alone, says why, and knows when it will; combinations add nothing of their own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.core.request import Priority
from scheduling.core.triggers import (
    AllOf,
    AnyOf,
    BatchView,
    Fired,
    MemoryPressure,
    OldestWait,
    SizeThreshold,
    Trigger,
    TriggerError,
    TriggerLog,
    UrgentPresent,
    batch_triggers,
    parse_trigger,
)

simple = st.one_of(
    st.builds(SizeThreshold, st.integers(1, 20)),
    st.builds(OldestWait, st.floats(0, 10)),
    st.builds(UrgentPresent, st.integers(0, 5), st.booleans()),
    st.builds(MemoryPressure, st.floats(0, 1)),
)
triggers = st.recursive(
    simple,
    lambda inner: (
        st.builds(AnyOf, st.lists(inner, max_size=4)) | st.builds(AllOf, st.lists(inner, min_size=1, max_size=4))
    ),
    max_leaves=6,
)
views = st.builds(BatchView, st.integers(1, 30), st.floats(0, 20), st.integers(0, 5), st.floats(0, 1))


@given(trigger=triggers)
def test_nothing_fires_while_nothing_waits(trigger: Trigger) -> None:
    assert trigger.check(BatchView(0, free_block_share=0.0)) is None
    assert trigger.due_s(BatchView(0, free_block_share=0.0)) is None


@given(trigger=triggers, view=views)
def test_what_is_due_now_fires_and_what_fires_is_due_now(trigger: Trigger, view: BatchView) -> None:
    assert (trigger.check(view) is not None) == (trigger.due_s(view) == 0)


@given(trigger=triggers, view=views)
def test_it_fires_when_it_said_it_would(trigger: Trigger, view: BatchView) -> None:
    due_s = trigger.due_s(view)
    if due_s is not None:
        later = view._replace(oldest_wait_s=view.oldest_wait_s + due_s + 1e-9)
        fired = trigger.check(later)
        assert fired is not None
        assert fired.reason


@given(parts=st.lists(simple, min_size=1, max_size=4), view=views)
def test_any_and_all_are_what_they_say(parts: list[Trigger], view: BatchView) -> None:
    fired = [part.check(view) is not None for part in parts]
    assert (AnyOf(parts).check(view) is not None) == any(fired)
    assert (AllOf(parts).check(view) is not None) == all(fired)


def test_each_says_why_it_fired() -> None:
    view = BatchView(8, 0.061, Priority.CRITICAL, 0.04)
    assert SizeThreshold(8).check(view) == Fired("size", "8 of 8 wait")
    assert OldestWait(0.05).check(view) == Fired("wait", "the oldest has waited 61 ms")
    assert UrgentPresent(alone=True).check(view) == Fired("urgent", "a request of priority critical is there", True)
    assert MemoryPressure().check(view) == Fired("memory", "what waits leaves 4% of KV blocks free")
    both = AllOf([SizeThreshold(8), MemoryPressure()]).check(view)
    assert both == Fired("size+memory", "8 of 8 wait, and what waits leaves 4% of KV blocks free")
    lone = AllOf([UrgentPresent(alone=True), SizeThreshold(8)]).check(view)
    assert lone is not None
    assert lone.alone


def test_the_usual_triggers_start_a_batch_of_eight_or_after_fifty_milliseconds() -> None:
    usual = batch_triggers()
    assert usual.check(BatchView(7, 0.049, Priority.HIGH, 0.9)) is None
    assert usual.due_s(BatchView(7, 0.02, Priority.HIGH, 0.9)) == pytest.approx(0.03)
    log = TriggerLog()
    for view in (BatchView(8, 0.0, 3), BatchView(1, 0.05, 3), BatchView(1, 0.0, 1)):
        fired = usual.check(view)
        assert fired is not None
        log.note(fired)
    assert log.counts == {"size": 1, "wait": 1, "urgent": 1}
    assert log.latest == Fired("urgent", "a request of priority realtime is there")


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SizeThreshold(0)
    with pytest.raises(ValueError, match="number of seconds"):
        OldestWait(float("nan"))
    with pytest.raises(ValueError, match="share"):
        MemoryPressure(1.5)
    with pytest.raises(ValueError, match="always fire"):
        AllOf([])


def test_an_expression_becomes_the_trigger_that_it_describes() -> None:
    assert parse_trigger({}) is None
    assert parse_trigger({"size": 8}) == SizeThreshold(8)
    expression = {"any": [{"urgent_alone": 1}, {"all": [{"wait_s": 0.02}, {"memory": 0.1}]}, {"urgent": 2}]}
    expected = AnyOf(
        (UrgentPresent(1, alone=True), AllOf((OldestWait(0.02), MemoryPressure(0.1))), UrgentPresent(2)),
    )
    assert parse_trigger(expression) == expected


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ([], "one key"),
        ({"size": 8, "wait_s": 1}, "one key"),
        ({"sometimes": 1}, "no trigger 'sometimes'"),
        ({"size": "8"}, "needs a number"),
        ({"size": True}, "needs a number"),
        ({"size": 0}, "at least one"),
        ({"size": 1.5}, "whole number"),
        ({"size": float("inf")}, "size"),
        ({"wait_s": -1}, "0 or more"),
        ({"urgent": 6}, "6 is not a valid"),
        ({"memory": 2}, "between 0 and 1"),
        ({"any": []}, "1 to 8"),
        ({"all": {"size": 8}}, "1 to 8"),
        ({"any": [{"any": [{"any": [{"any": [{"any": [{"size": 1}]}]}]}]}]}, "4 deep"),
    ],
)
def test_an_expression_that_is_none_is_refused_with_a_sentence(expression: object, says: str) -> None:
    with pytest.raises(TriggerError, match=says):
        parse_trigger(expression)
