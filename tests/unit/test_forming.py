"""How batches form in the modes that collect: what starts them, who goes along, and what is said of it."""

import pytest

from scheduling.core.blocks import BlockAllocator
from scheduling.core.forming import Mode
from scheduling.core.planner import StepPlanner
from scheduling.core.sequence import PartResult
from scheduling.core.triggers import parse_trigger
from tests.sequences import make_sequence


def make_planner(mode: Mode, expression: object, batch: int = 4, blocks: int = 64) -> StepPlanner:
    trigger = parse_trigger(expression)
    return StepPlanner(mode, batch, 64, BlockAllocator(blocks, 4), 200, lambda: 0.0, trigger=trigger)


def plan(planner: StepPlanner, now: float) -> list[str]:
    return [part.sequence.id for part in planner.plan(now)]


def finish(planner: StepPlanner, now: float) -> None:
    while planner.num_running:
        parts = planner.plan(now)
        planner.apply(parts, [PartResult(5 if part.samples else None) for part in parts])


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_size_threshold_starts_a_batch_before_it_is_full(mode: Mode) -> None:
    planner = make_planner(mode, {"size": 2})
    planner.add(make_sequence("a"))
    assert plan(planner, 100.0) == []
    planner.add(make_sequence("b"))
    assert plan(planner, 100.0) == ["a", "b"]
    assert planner.trigger_log.counts == {"size": 1}


def test_a_full_batch_starts_whatever_the_triggers_say() -> None:
    planner = make_planner("dynamic", {"wait_s": 1000}, batch=2)
    for name in "abc":
        planner.add(make_sequence(name))
    assert plan(planner, 0.0) == ["a", "b"]


def test_an_urgent_request_starts_the_batch_at_once_and_the_others_go_along() -> None:
    planner = make_planner("dynamic", {"any": [{"urgent": 1}, {"wait_s": 60}]})
    planner.add(make_sequence("normal"))
    assert plan(planner, 1.0) == []
    assert planner.due_s(1.0) == 59.0
    planner.add(make_sequence("urgent", priority=1))
    assert planner.due_s(1.0) == 0.0
    assert sorted(plan(planner, 1.0)) == ["normal", "urgent"]
    latest = planner.trigger_log.latest
    assert latest is not None
    assert (latest.trigger, latest.reason) == ("urgent", "a request of priority realtime is there")


def test_an_urgent_request_may_go_alone_and_the_others_form_the_next_batch() -> None:
    planner = make_planner("dynamic", {"any": [{"urgent_alone": 1}, {"wait_s": 60}]}, batch=2)
    planner.add(make_sequence("normal"))
    planner.add(make_sequence("urgent", priority=0))
    assert plan(planner, 1.0) == ["urgent"]
    finish(planner, 1.0)
    assert plan(planner, 2.0) == []
    assert plan(planner, 60.0) == ["normal"]
    assert planner.trigger_log.counts == {"urgent": 1, "wait": 1}


def test_a_batch_starts_when_what_waits_would_fill_the_cache() -> None:
    planner = make_planner("dynamic", {"memory": 0.5}, blocks=20)
    planner.add(make_sequence("a", prompt=20))
    assert plan(planner, 100.0) == [], "it needs 5 blocks of 20"
    planner.add(make_sequence("b", prompt=17))
    assert planner.due_s(100.0) == 0.0
    assert plan(planner, 100.0) == ["a", "b"]
    latest = planner.trigger_log.latest
    assert latest is not None
    assert (latest.trigger, latest.reason) == ("memory", "what waits leaves 50% of KV blocks free")


def test_where_more_waits_than_the_cache_holds_nothing_of_it_is_free() -> None:
    planner = make_planner("dynamic", {"memory": 0.0}, blocks=20)
    planner.add(make_sequence("a"))
    assert plan(planner, 100.0) == []
    planner.add(make_sequence("b", prompt=76, output=1))
    planner.add(make_sequence("c", prompt=76, output=1))
    assert plan(planner, 100.0) == ["a"]
    assert planner.trigger_log.counts == {"memory": 1}


def test_all_of_several_must_fire_where_that_is_asked_for() -> None:
    planner = make_planner("static", {"all": [{"size": 2}, {"wait_s": 5}]})
    planner.add(make_sequence("a"))
    assert plan(planner, 6.0) == []
    planner.add(make_sequence("b"))
    assert plan(planner, 4.0) == []
    assert plan(planner, 5.0) == ["a", "b"]
    assert planner.trigger_log.counts == {"size+wait": 1}


def test_static_without_triggers_takes_what_waits_and_modes_that_do_not_collect_ask_none() -> None:
    assert_starts_at_once(make_planner("static", {}))
    assert_starts_at_once(make_planner("continuous", {"size": 9}))
    assert_starts_at_once(make_planner("serial", {"size": 9}))


def assert_starts_at_once(planner: StepPlanner) -> None:
    planner.add(make_sequence("a"))
    assert planner.due_s(0.0) == 0.0
    assert plan(planner, 0.0) == ["a"]
    assert not planner.trigger_log.counts
