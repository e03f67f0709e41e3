"""Batches calls inside one process: submit requests one by one, an async function gets them together.

The queue, policies, triggers and sizing are those of the fleet; nothing here needs Django, Redis or torch.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Generic, Self, TypeVar

from scheduling.core.adaptation import PolicyInForce
from scheduling.core.batching.checks import check_request
from scheduling.core.batching.errors import BatcherClosedError, BatcherError, BatcherFullError, BatchResultError
from scheduling.core.batching.health import BatcherHealth
from scheduling.core.policies import build_policy, deadline_of
from scheduling.core.policy import Policy
from scheduling.core.queue import FlowQueue
from scheduling.core.request import Priority, QueueEntry
from scheduling.core.sizing.controller import Observation, Sizing
from scheduling.core.sizing.strategies import build_sizing
from scheduling.core.triggers import BatchView, Fired, Trigger, TriggerLog, batch_triggers

In = TypeVar("In")
Out = TypeVar("Out")
RunBatch = Callable[[Sequence[In]], Awaitable[Sequence[Out | BaseException]]]
"""Takes a batch and gives as many results in its order; an exception among them belongs to its request alone."""

OWNER = "batcher"
NO_LIMIT = 2**62
LATENCY_WINDOW = 256


@dataclass(slots=True, eq=False)
class _Waiting(Generic[In, Out]):
    entry: QueueEntry
    item: In
    future: asyncio.Future[Out]


class Batcher(Generic[In, Out]):
    """Collects requests into batches by a policy, triggers and a sizing strategy, and runs them.

    `async with` it, and `submit` inside; leaving the block runs all that waits, at once, and then returns. Use it from
    the event loop that entered it. Not more than `max_concurrent` batches run at a time.
    """

    def __init__(
        self,
        run_batch: RunBatch[In, Out],
        *,
        policy: Policy,
        sizing: Sizing,
        triggers: Callable[[int], Trigger],
        max_waiting: int = 10_000,
        max_concurrent: int = 1,
        isolate_errors: bool = True,
        used_tokens: Callable[[In, Out], int] | None = None,
        target_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`triggers` makes the trigger for a batch size; `used_tokens` says what a result really cost its tenant.

        With `isolate_errors` a batch that raises is run again, each request alone, so that only the guilty one fails;
        without, all of the batch get the exception. `target_s` is the latency that sizing strategies steer by.
        """
        if max_waiting < 1 or max_concurrent < 1:
            raise ValueError("A batcher holds at least one request and runs at least one batch.")
        self._run_batch = run_batch
        self._sizing = sizing
        self._triggers = triggers
        self._max_waiting = max_waiting
        self._isolates = isolate_errors
        self._used_tokens = used_tokens
        self._target_s = target_s
        self._clock = clock
        self._queue = FlowQueue(clock)
        self._policy = PolicyInForce(policy, self._queue, deadline_of, clock())
        self._waiting: dict[str, _Waiting[In, Out]] = {}
        """In order of arrival."""
        self._levels: Counter[int] = Counter()
        self._num_submitted = self._num_running = self._batches = self._finished = self._failed = 0
        self._sequences = 0
        self._busy_s = 0.0
        self._latencies: deque[float] = deque(maxlen=LATENCY_WINDOW)
        self._log = TriggerLog()
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(max_concurrent)
        self._tasks: set[asyncio.Task[None]] = set()
        self._worker: asyncio.Task[None] | None = None
        self._closing = False

    @classmethod
    def for_batches(
        cls,
        run_batch: RunBatch[In, Out],
        *,
        size: int = 8,
        wait_s: float = 0.05,
        policy: str = "fifo",
        sizing: str = "fixed",
        urgent_alone: bool = False,
        max_waiting: int = 10_000,
        max_concurrent: int = 1,
        isolate_errors: bool = True,
        used_tokens: Callable[[In, Out], int] | None = None,
        target_s: float | None = None,
        seed: int = 0,
    ) -> Self:
        """A batcher around a function of a batch: at most `size` together (with another sizing: to begin with).

        A batch starts when it is full, when its oldest request has waited `wait_s`, or when an urgent request is there,
        which with `urgent_alone` goes without the others.
        """
        return cls(
            run_batch,
            policy=build_policy(policy),
            sizing=build_sizing(sizing, {"initial": size}, random=Random(seed)),  # noqa: S311
            triggers=lambda batch_size: batch_triggers(batch_size, wait_s, alone=urgent_alone),
            max_waiting=max_waiting,
            max_concurrent=max_concurrent,
            isolate_errors=isolate_errors,
            used_tokens=used_tokens,
            target_s=target_s,
        )

    @classmethod
    def for_each(
        cls,
        run_one: Callable[[In], Awaitable[Out]],
        *,
        size: int = 8,
        wait_s: float = 0.05,
        policy: str = "fifo",
        sizing: str = "fixed",
        max_waiting: int = 10_000,
        target_s: float | None = None,
    ) -> Self:
        """A batcher around a function of one request: those of a batch run concurrently, the next batch after them."""

        async def run_batch(items: Sequence[In]) -> Sequence[Out | BaseException]:
            return await asyncio.gather(*(run_one(item) for item in items), return_exceptions=True)

        return cls.for_batches(
            run_batch,
            size=size,
            wait_s=wait_s,
            policy=policy,
            sizing=sizing,
            max_waiting=max_waiting,
            target_s=target_s,
        )

    async def __aenter__(self) -> Self:
        if self._worker is not None:
            raise BatcherError("A batcher is entered only once.")
        self._worker = asyncio.create_task(self._work(), name="batcher")
        self._worker.add_done_callback(self._end_work)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Run what waits, then end. Where the block was cancelled, what waits or runs is cancelled too."""
        assert self._worker is not None
        self._closing = True
        self._changed.set()
        try:
            if error is not None and not isinstance(error, Exception):
                self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=error is not None)
        finally:
            self._abandon()

    def submit(
        self,
        item: In,
        *,
        tenant: str = "default",
        priority: int = Priority.NORMAL,
        tokens: int = 1,
        deadline_s: float | None = None,
        share: float = 1.0,
    ) -> asyncio.Future[Out]:
        """Queue a request; the future gets its result or its exception. Cancelling the future takes it out again.

        `tokens` is what it is expected to cost, `share` the tenant's weight under a fair policy, `deadline_s` a time of
        the batcher's clock. Raises BatcherClosedError, BatcherRequestError or BatcherFullError.
        """
        if self._worker is None or self._closing or self._worker.done():
            raise BatcherClosedError
        check_request(priority, tokens, deadline_s, share)
        self._num_submitted += 1
        entry = QueueEntry(
            id=str(self._num_submitted),
            tenant=tenant,
            priority=priority,
            arrival_s=self._clock(),
            prompt_tokens=tokens,
            max_tokens=0,
            deadline_s=deadline_s,
            share=share,
        )
        policy, limit = self._policy, self._max_waiting
        placement = policy.policy.place(entry)
        answer = self._queue.enqueue(entry, placement, revision=policy.revision, depth_limit=limit, keep_s=0)
        if answer.status == "full":
            raise BatcherFullError(limit)
        future: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        self._waiting[entry.id] = _Waiting(entry, item, future)
        self._levels[priority] += 1
        policy.note(entry)
        policy.look(entry.arrival_s)
        future.add_done_callback(lambda done: self._withdraw(entry.id) if done.cancelled() else None)
        self._changed.set()
        return future

    def health(self) -> BatcherHealth:
        """Figures of this moment."""
        batches = self._batches
        return BatcherHealth(
            batches=batches,
            finished=self._finished,
            failed=self._failed,
            depth=len(self._waiting),
            running=self._num_running,
            mean_size=self._sequences / batches if batches else 0.0,
            mean_duration_s=self._busy_s / batches if batches else 0.0,
            batch_size=self._sizing.decide().batch_size,
            triggers=dict(self._log.counts),
            latest_reason=self._log.latest.reason if self._log.latest else "",
            policy=self._policy.chosen,
            policy_reason=self._policy.changes[-1].reason if self._policy.changes else "",
        )

    async def _work(self) -> None:
        """Start a batch whenever a trigger fires and a slot is free, until closed and empty."""
        while True:
            await self._slots.acquire()
            fired = await self._await_trigger()
            if fired is None:
                break
            batch = self._take(self._log.note(fired))
            task = asyncio.create_task(self._run(batch), name="batch")
            self._tasks.add(task)
            task.add_done_callback(lambda task, batch=batch: self._end_task(task, batch))  # type: ignore[misc]
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _end_task(self, task: asyncio.Task[None], batch: list[_Waiting[In, Out]]) -> None:
        """Whatever became of a batch, its slot is free, and nobody is left without an answer."""
        self._tasks.discard(task)
        self._slots.release()
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        for waiting in batch:
            if error is not None and not waiting.future.done():
                _set_exception(waiting.future, error)

    def _end_work(self, worker: asyncio.Task[None]) -> None:
        """The worker fails only by a trigger or sizing strategy of the user's that raised; nothing would ever run."""
        if not worker.cancelled() and (error := worker.exception()) is not None:
            for request_id in tuple(self._waiting):
                _set_exception(self._leave(request_id).future, error)

    async def _await_trigger(self) -> Fired | None:
        """Why the next batch starts; None when closed and nothing waits."""
        while True:
            view = self._view()
            if self._closing:
                return Fired("drain", "the batcher is closing") if self._waiting else None
            trigger = self._triggers(self._sizing.decide().batch_size)
            # Where nothing waits there is nothing to start, whatever a trigger of the user's says.
            fired = trigger.check(view) if view.num_waiting else None
            if fired is not None:
                return fired
            self._changed.clear()
            try:
                async with asyncio.timeout(trigger.due_s(view) if view.num_waiting else None):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _view(self) -> BatchView:
        oldest = next(iter(self._waiting.values()), None)
        if oldest is None:
            return BatchView(0)
        urgent = min(level for level, count in self._levels.items() if count)
        return BatchView(len(self._waiting), self._clock() - oldest.entry.arrival_s, urgent)

    def _take(self, fired: Fired) -> list[_Waiting[In, Out]]:
        """The next batch, in the policy's order, or the most urgent requests alone."""
        size = self._sizing.decide().batch_size
        self._policy.look(self._clock())
        if fired.alone:
            urgent = min(level for level, count in self._levels.items() if count)
            ids = [id_ for id_, waiting in self._waiting.items() if waiting.entry.priority == urgent][:size]
            for id_ in ids:
                # Out of turn, and so not charged to its flow.
                self._queue.cancel(id_)
        else:
            claimed = self._queue.claim(OWNER, max_requests=size, max_tokens=NO_LIMIT, lease_s=math.inf)
            ids = [request.id for request in claimed.requests]
        return [self._leave(id_) for id_ in ids]

    def _leave(self, request_id: str) -> _Waiting[In, Out]:
        waiting = self._waiting.pop(request_id)
        self._levels[waiting.entry.priority] -= 1
        self._policy.forget(request_id)
        return waiting

    def _withdraw(self, request_id: str) -> None:
        """A future was cancelled: its request leaves the queue, unless it runs already."""
        if request_id in self._waiting:
            self._queue.cancel(request_id)
            self._leave(request_id)
            self._changed.set()

    async def _run(self, batch: list[_Waiting[In, Out]]) -> None:
        started_s = self._clock()
        self._num_running += len(batch)
        try:
            results = await self._call([waiting.item for waiting in batch])
        finally:
            self._num_running -= len(batch)
        for waiting, result in zip(batch, results, strict=True):
            self._answer(waiting, result)
        self._measure(len(batch), self._clock() - started_s)

    async def _call(self, items: list[In]) -> Sequence[Out | BaseException]:
        """The results of a batch; where it raises, of each request alone."""
        try:
            results = await self._run_batch(items)
            if len(results) == len(items):
                return results
            failure: Exception = BatchResultError(len(items), len(results))
        except Exception as error:
            if self._isolates and len(items) > 1:
                return [(await self._call([item]))[0] for item in items]
            failure = error
        return [failure] * len(items)

    def _answer(self, waiting: _Waiting[In, Out], result: Out | BaseException) -> None:
        """Pass a result on and correct what the request's flow was charged."""
        entry, used_tokens = waiting.entry, waiting.entry.cost_tokens
        if self._used_tokens is not None and not isinstance(result, BaseException):
            try:
                used_tokens = self._used_tokens(waiting.item, result)
            except Exception as error:
                result = error
        self._queue.finish(OWNER, entry.id, 1, state="finished", used_tokens=used_tokens, finish=b"", output="")
        self._latencies.append(self._clock() - entry.arrival_s)
        if isinstance(result, BaseException):
            self._failed += 1
        else:
            self._finished += 1
        if waiting.future.done():
            return
        if isinstance(result, BaseException):
            _set_exception(waiting.future, result)
        else:
            waiting.future.set_result(result)

    def _measure(self, size: int, seconds: float) -> None:
        """Count a batch, and let the sizing strategy see it."""
        self._batches += 1
        self._sequences += size
        self._busy_s += seconds
        latencies = sorted(self._latencies)
        good = sum(latency <= (self._target_s or math.inf) for latency in list(self._latencies)[-size:])
        self._sizing.observe(
            Observation(
                now_s=self._clock(),
                seconds=seconds,
                steps=1,
                step_s=seconds,
                tokens=size,
                good_tokens=good,
                num_running=size,
                num_waiting=len(self._waiting),
                p99_s=latencies[int(0.99 * (len(latencies) - 1))],
                target_s=self._target_s,
                kv_blocks_total=NO_LIMIT,
            )
        )

    def _abandon(self) -> None:
        """After a cancelled block: nobody waits for what did not run."""
        for task in tuple(self._tasks):
            task.cancel()
        for request_id in tuple(self._waiting):
            waiting = self._leave(request_id)
            self._queue.cancel(request_id)
            waiting.future.cancel()


def _set_exception(future: asyncio.Future[Out], error: BaseException) -> None:
    """A cancellation is passed on as one: a future does not take it for an exception."""
    if isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)
