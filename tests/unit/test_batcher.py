"""The in-process batcher: batches form by triggers and policy, errors stay with their request, closing drains."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.core.batching.batcher import Batcher
from scheduling.core.batching.errors import (
    BatcherClosedError,
    BatcherError,
    BatcherFullError,
    BatcherRequestError,
    BatchResultError,
)
from scheduling.core.policies import POLICIES, build_policy
from scheduling.core.request import Priority
from scheduling.core.sizing.strategies import build_sizing
from scheduling.core.triggers import BatchView, Fired, batch_triggers

DOCS = Path(__file__).parents[2] / "docs"
SOON_S = 60.0
"""Deadline of a test's waiting; reached only by a failure."""


class Model:
    """A batch function that notes its batches; it can be held back, and fails on what it is told to."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[Any]] = []
        self.began = asyncio.Semaphore(0)
        self.gate = asyncio.Event()
        if not held:
            self.gate.set()

    async def __call__(self, items: Sequence[Any]) -> list[Any]:
        self.batches.append(list(items))
        self.began.release()
        await self.gate.wait()
        if any(item == "poison" for item in items):
            raise RuntimeError("poisoned batch")
        return [ValueError(item) if item == "bad" else f"<{item}>" for item in items]


async def results(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    async with asyncio.timeout(SOON_S):
        return await asyncio.gather(*futures, return_exceptions=True)


async def test_requests_submitted_together_run_in_batches_of_eight() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=0.01) as batcher:
        assert await results([batcher.submit(i) for i in range(20)]) == [f"<{i}>" for i in range(20)]
        health = batcher.health()
    assert [len(batch) for batch in model.batches] == [8, 8, 4]
    assert (health.batches, health.finished, health.failed, health.depth) == (3, 20, 0, 0)
    assert health.mean_size == pytest.approx(20 / 3)
    assert health.triggers == {"size": 2, "wait": 1}


async def test_a_lone_request_runs_after_its_wait() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=0.02) as batcher:
        started = asyncio.get_running_loop().time()
        assert await results([batcher.submit("one")]) == ["<one>"]
        assert asyncio.get_running_loop().time() - started >= 0.019
        assert batcher.health().latest_reason.startswith("the oldest has waited")


async def test_an_urgent_request_starts_the_batch_and_takes_the_others_along() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=60, policy="priority") as batcher:
        futures = [batcher.submit("slow"), batcher.submit("fast", priority=Priority.REALTIME)]
        assert await results(futures) == ["<slow>", "<fast>"]
    assert model.batches == [["fast", "slow"]]


async def test_an_urgent_request_can_go_alone() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=60, urgent_alone=True) as batcher:
        slow = batcher.submit("slow")
        assert await results([batcher.submit("fast", priority=Priority.CRITICAL)]) == ["<fast>"]
        assert not slow.done()
    assert model.batches == [["fast"], ["slow"]]
    assert slow.result() == "<slow>"


async def test_one_request_s_exception_reaches_its_future_alone() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=0.01) as batcher:
        good, bad, other = await results([batcher.submit(item) for item in ("a", "bad", "b")])
        assert (good, other) == ("<a>", "<b>")
        assert isinstance(bad, ValueError)
        assert batcher.health().failed == 1


async def test_a_batch_that_raises_is_run_again_one_by_one_unless_told_not_to() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=0.01) as batcher:
        good, bad = await results([batcher.submit(item) for item in ("a", "poison")])
    assert good == "<a>"
    assert isinstance(bad, RuntimeError)
    assert model.batches == [["a", "poison"], ["a"], ["poison"]]
    async with Batcher.for_batches(Model(), wait_s=0.01, isolate_errors=False) as batcher:
        both = await results([batcher.submit(item) for item in ("a", "poison")])
    assert all(isinstance(one, RuntimeError) for one in both)


async def test_too_few_results_are_an_error_of_the_batch() -> None:
    async def forgetful(items: Sequence[int]) -> list[int]:
        return list(items)[1:]

    async with Batcher.for_batches(forgetful, wait_s=0.01) as batcher:
        both = await results([batcher.submit(1), batcher.submit(2)])
    assert all(isinstance(one, BatchResultError) for one in both)
    assert "got 2 requests and gave 1 results" in str(both[0])


async def test_leaving_the_block_runs_what_waits_at_once() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=3600) as batcher:
        futures = [batcher.submit(i) for i in range(11)]
        batcher.submit(11)
    assert [future.result() for future in futures] == [f"<{i}>" for i in range(11)]
    assert [len(batch) for batch in model.batches] == [8, 4]
    with pytest.raises(BatcherClosedError):
        batcher.submit(12)


async def test_an_exception_in_the_block_still_drains() -> None:
    futures = []

    async def fail() -> None:
        async with Batcher.for_batches(Model(), wait_s=3600) as batcher:
            futures.append(batcher.submit("x"))
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert futures[0].result() == "<x>"


async def test_a_cancelled_block_cancels_what_waits_and_runs() -> None:
    model, entered = Model(held=True), asyncio.Event()
    futures: list[asyncio.Future[Any]] = []

    async def use() -> None:
        async with Batcher.for_batches(model, size=2, wait_s=3600) as batcher:
            futures.extend(batcher.submit(i) for i in range(5))
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await entered.wait()
    await model.began.acquire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await results(futures)
    assert all(future.cancelled() for future in futures)


async def test_a_cancelled_future_leaves_the_queue_and_a_running_one_is_dropped() -> None:
    model = Model(held=True)
    async with Batcher.for_batches(model, size=1, wait_s=0) as batcher:
        first, second, third = (batcher.submit(i) for i in range(3))
        await model.began.acquire()
        first.cancel()
        second.cancel()
        await asyncio.sleep(0)
        assert batcher.health().depth == 1
        model.gate.set()
        assert await results([third]) == ["<2>"]
    assert model.batches == [[0], [2]]


async def test_requests_beyond_the_bound_are_refused() -> None:
    async with Batcher.for_batches(Model(), wait_s=3600, max_waiting=2) as batcher:
        futures = [batcher.submit(1), batcher.submit(2)]
        with pytest.raises(BatcherFullError, match="2 requests wait already"):
            batcher.submit(3)
    assert [future.result() for future in futures] == ["<1>", "<2>"]


@pytest.mark.parametrize(
    ("said", "policy", "sentence"),
    [
        ({"priority": -1}, "fifo", "from 0 .critical. to 5 .bulk., not -1"),
        ({"priority": 6}, "wrr", "not 6"),
        ({"tokens": -1}, "fair", "0 tokens or more, not -1"),
        ({"share": float("nan")}, "fair", "above 0, not nan"),
        ({"share": 0}, "fair", "above 0, not 0"),
        ({"deadline_s": float("nan")}, "edf", "of the batcher's clock, not nan"),
    ],
)
async def test_a_request_that_is_told_wrong_is_refused_and_harms_no_other(
    said: dict[str, Any], policy: str, sentence: str
) -> None:
    async with Batcher.for_batches(Model(), wait_s=0.01, policy=policy) as batcher:
        before = batcher.submit("before")
        with pytest.raises(BatcherRequestError, match=sentence):
            batcher.submit("wrong", **said)
        assert await results([before, batcher.submit("after")]) == ["<before>", "<after>"]


async def test_batches_run_one_after_another_unless_more_are_allowed() -> None:
    for allowed in (1, 3):
        model = Model(held=True)
        async with Batcher.for_batches(model, size=2, wait_s=0, max_concurrent=allowed) as batcher:
            futures = [batcher.submit(i) for i in range(10)]
            for _ in range(allowed):
                await model.began.acquire()
            assert batcher.health().running == 2 * allowed
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(model.batches) == allowed
            model.gate.set()
            await results(futures)


async def test_a_function_of_one_request_runs_concurrently_in_its_batch() -> None:
    running = most = 0

    async def double(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        if item == 3:
            raise ValueError
        return 2 * item

    async with Batcher.for_each(double, size=4, wait_s=0.01) as batcher:
        answers = await results([batcher.submit(i) for i in range(8)])
    assert [a for a in answers if isinstance(a, int)] == [0, 2, 4, 8, 10, 12, 14]
    assert isinstance(answers[3], ValueError)
    assert most == 4


async def test_fair_shares_batches_between_tenants_by_what_results_really_cost() -> None:
    model = Model(held=True)
    async with Batcher.for_batches(
        model, size=2, wait_s=0, policy="fair", used_tokens=lambda item, _: 10 if item.startswith("a") else 1
    ) as batcher:
        futures = [batcher.submit(f"{t}{i}", tenant=t) for t in "ab" for i in range(20)]
        model.gate.set()
        await results(futures)
    order = [item[0] for batch in model.batches for item in batch]
    assert order[:20].count("b") > 2 * order[:20].count("a")


async def test_a_sizing_strategy_changes_the_batch_size() -> None:
    model = Model()
    async with Batcher.for_batches(model, size=2, wait_s=0.01, sizing="throughput_first") as batcher:
        await results([batcher.submit(i) for i in range(200)])
        assert batcher.health().batch_size > 8
    assert len(model.batches[0]) == 2
    assert max(len(batch) for batch in model.batches) > 8


async def test_a_trigger_that_raises_fails_the_waiting_and_the_block() -> None:
    class Broken:
        def check(self, view: BatchView) -> Fired | None:
            if view.num_waiting:
                raise ZeroDivisionError
            return None

        def due_s(self, view: BatchView) -> float | None:
            return None

    batcher = Batcher.for_batches(Model())
    batcher._triggers = lambda size: Broken()
    with pytest.raises(ZeroDivisionError):
        async with batcher:
            assert isinstance((await results([batcher.submit(1)]))[0], ZeroDivisionError)
    with pytest.raises(BatcherError, match="entered only once"):
        async with batcher:
            pass


async def test_a_trigger_that_always_fires_starts_no_empty_batch() -> None:
    class Eager:
        def check(self, view: BatchView) -> Fired | None:
            return Fired("eager", "always")

        def due_s(self, view: BatchView) -> float | None:
            return 0.0

    model = Model()
    batcher = Batcher.for_batches(model)
    batcher._triggers = lambda size: Eager()
    async with batcher:
        assert await results([batcher.submit(1)]) == ["<1>"]
        for _ in range(5):
            await asyncio.sleep(0)
    assert model.batches == [[1]]


async def test_requests_past_their_deadline_run_in_full_batches_too() -> None:
    model = Model()
    async with Batcher.for_batches(model, wait_s=0, policy="edf") as batcher:
        await results([batcher.submit(i, deadline_s=0.0) for i in range(2400)])
        assert batcher.health().finished == 2400
    assert {len(batch) for batch in model.batches} == {8}


async def test_the_adaptive_policy_switches_when_one_tenant_floods_and_says_why() -> None:
    model, now_s = Model(held=True), 1000.0
    batcher = Batcher(
        model,
        policy=build_policy("adaptive", {"dwell_s": 5, "hold_s": 5}),
        sizing=build_sizing("fixed", {"initial": 3}),
        triggers=lambda size: batch_triggers(size, 0.0),
        clock=lambda: now_s,
    )
    async with batcher:
        futures = [batcher.submit(f"a{i}", tenant="a", tokens=100) for i in range(40)]
        await model.began.acquire()
        assert batcher.health().policy == "fifo"
        now_s += 3
        futures += [batcher.submit(f"{tenant}0", tenant=tenant) for tenant in "bc"]
        now_s += 6
        model.gate.set()
        await results(futures)
        health = batcher.health()
    assert model.batches[:2] == [["a0", "a1", "a2"], ["a3", "b0", "c0"]]
    assert health.policy == "fair"
    assert health.policy_reason.startswith("one tenant has")


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.sampled_from(["ok", "bad", "poison"])), max_size=40
    ),
    policy=st.sampled_from(sorted(POLICIES)),
    size=st.integers(1, 9),
    concurrent=st.integers(1, 3),
    alone=st.booleans(),
)
def test_every_request_is_answered_once_whatever_fails(
    items: list[tuple[int, int, str]], policy: str, size: int, concurrent: int, alone: bool
) -> None:
    async def run(items_: Sequence[tuple[int, str]]) -> list[Any]:
        assert len(items_) <= size
        if len(items_) > 1 and any(kind == "poison" for _, kind in items_):
            raise RuntimeError
        return [number if kind == "ok" else KeyError(number) for number, kind in items_]

    async def main() -> list[Any]:
        batcher = Batcher.for_batches(
            run, size=size, wait_s=0, policy=policy, max_concurrent=concurrent, urgent_alone=alone
        )
        async with batcher:
            futures = [
                batcher.submit((number, kind), tenant=str(tenant), priority=priority)
                for number, (tenant, priority, kind) in enumerate(items)
            ]
        assert all(future.done() for future in futures)
        return await results(futures)

    for number, (answer, (_, _, kind)) in enumerate(zip(asyncio.run(main()), items, strict=True)):
        assert (answer == number) if kind == "ok" else answer.args == (number,)


def test_the_examples_in_the_documentation_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "batcher.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/batcher.md", "exec"), {"__name__": "__main__"})
    assert "BatcherHealth(batches=3" in capsys.readouterr().out
