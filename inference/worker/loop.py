"""The engine loop: heed, take what was claimed, plan, compute, hand over; one step after the other."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from inference.engine.errors import DeviceStarved, OutOfDeviceMemory
from inference.worker.active import ActiveRequest, RequestRefusedError, check_request
from inference.worker.commands import Controls
from inference.worker.costs import StepCosts
from inference.worker.gate import Gate
from inference.worker.inbox import Inbox
from inference.worker.intake import Intake
from inference.worker.lease import Lease
from inference.worker.meters import Meters
from inference.worker.outbox import Outbox, Output
from inference.worker.pipe import Pipe
from inference.worker.reporter import PERIOD_S, Reporter
from inference.worker.serving import ServingLoop
from inference.worker.sizer import Sizer
from inference.worker.status import StatusBoard
from scheduling.core.planner import RequestTooLongError, StepOutput, StepPlanner
from scheduling.core.room import NO_ROOM, UrgentRoom
from scheduling.core.sequence import PartResult, StepPart
from scheduling.core.sequence import Sequence as Running
from scheduling.core.sizing.cost_model import StepFeatures, measure_parts

logger = logging.getLogger(__name__)

URGENT_OFFER_S = 0.02
"""How often it is counted what an urgent request could have."""
MOST_STARVED = 3
"""How often in a row memory may lack for the smallest step of a request alone, before it is not they that ask much."""


class Runner(Protocol):
    """What the loop needs of the model runner; benchmarks put one without a model here."""

    vocab_size: int
    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    num_host_blocks: int
    """Places for KV blocks in host memory; 0: nothing can be swapped."""
    swap_bytes_per_s: float
    eos_token_ids: frozenset[int]

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (device block, host block) pairs of the KV cache out."""
        ...

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (host block, device block) pairs back."""
        ...

    runs_ahead: bool
    """Whether a step that was started is computed while the loop goes on."""

    def start(self, parts: Sequence[StepPart]) -> Callable[[], list[PartResult]]:
        """Begin a forward pass; the call that is returned waits for its results."""
        ...

    def foresee(self, sequences: Sequence[Running]) -> None:
        """Make ready, while a step runs, for one in which these decode."""
        ...

    def make_ready(self, batch_size: int) -> bool:
        """Between two steps, do a part of what batches of so many sequences lack; whether `describe` says more now."""
        ...

    def describe(self) -> str:
        """How the model is computed."""
        ...


class Step(NamedTuple):
    """A forward pass that was begun."""

    wait: Callable[[], list[PartResult]]
    features: StepFeatures
    started_s: float
    """Seconds that it took to begin."""


class EngineLoop(ServingLoop):
    """Owns the running batch of a model that is computed here."""

    def __init__(
        self,
        *,
        planner: StepPlanner,
        runner: Runner,
        lease: Lease,
        intake: Intake,
        outbox: Outbox,
        reporter: Reporter,
        inbox: Inbox,
        pipe: Pipe,
        gate: Gate,
        controls: Controls,
        board: StatusBoard,
        meters: Meters,
        costs: StepCosts,
        sizer: Sizer,
    ) -> None:
        super().__init__(
            lease=lease,
            intake=intake,
            outbox=outbox,
            reporter=reporter,
            inbox=inbox,
            pipe=pipe,
            gate=gate,
            controls=controls,
            board=board,
            meters=meters,
            sizer=sizer,
        )
        self._planner = planner
        self._runner = runner
        self._costs = costs
        self._stopped: set[str] = set()
        """Of these, those that have not begun or were preempted."""
        self._num_preempted = (0, 0)
        self._starved: list[str] = []
        """Requests that ran alone and found no memory, since a step was computed last."""
        self._postponed: set[str] = set()
        """Requests that once did so, and let others go first."""
        self._urgent: UrgentRoom | None = None
        self._urgent_due_s = 0.0

    def run(self) -> None:
        """Step until told to end. What is held then belongs to the caller to release. Raises DeviceStarved."""
        timeout_s = 0.0
        outputs: list[StepOutput] = []
        ended = time.perf_counter()
        while not self._gate.is_over:
            words = self._inbox.read(timeout_s)
            started = time.perf_counter() if timeout_s else ended
            self._heed(words)
            self._take_claimed()
            self._drain()
            self._sizer.tick()
            self._make_ready()
            parts = self._planner.plan(time.monotonic())
            self._note_turns(parts)
            self._move_blocks()
            step = self._start(parts) if parts else None
            is_busy = bool(parts or outputs)
            self._collect(outputs)  # of the step before, while the device computes this one
            self._hand_over()
            self._offer_room()
            outputs = self._finish(parts, step) if step else []
            ended = time.perf_counter()
            if is_busy:
                self._meters.count_busy(ended - started)
            self._board.update(self._reporter, self._active.values())
            timeout_s = 0.0 if is_busy else self._idle_s()

    def suspects(self) -> dict[str, int]:
        """Who may be to blame where `run` fails (id -> attempt): who runs, and who found no memory alone."""
        running = self._planner.sequences[: self._planner.num_running]
        ids = {*self._starved, *(sequence.id for sequence in running)}
        return {id_: self._active[id_].attempt for id_ in ids if id_ in self._active}

    def _admit(self, active: ActiveRequest) -> None:
        """Give a request to the planner, unless what its journal has is all."""
        check_request(active, vocab_size=self._runner.vocab_size)
        if active.num_resumed:
            self._send_again(active)
            reason = "stop" if active.stream.stopped else self._planner.finish_reason(active.sequence)
            if reason is not None:
                self._end(active, reason)
                return
        try:
            self._planner.add(active.sequence)
        except RequestTooLongError as refusal:
            raise RequestRefusedError("context_length_exceeded", str(refusal)) from refusal
        self._stopped.add(active.request.id)

    def _note_turns(self, parts: Sequence[StepPart]) -> None:
        """Note in the requests' timelines who lost its place in this step, and who begins or goes on.

        Costs nothing in steps in which nobody does.
        """
        num_preempted = (self._planner.num_preemptions, self._planner.num_slot_preemptions)
        if num_preempted == self._num_preempted and not self._stopped:
            return
        now_s = time.time()
        if num_preempted != self._num_preempted:
            displaced = num_preempted[1] - self._num_preempted[1] == num_preempted[0] - self._num_preempted[0]
            self._num_preempted = num_preempted
            for sequence in self._planner.sequences[self._planner.num_running :]:
                if sequence.id not in self._stopped:
                    self._stopped.add(sequence.id)
                    self._active[sequence.id].mark("displaced" if displaced else "preempted", now_s)
        for part in parts:
            if part.sequence.id in self._stopped:
                self._stopped.discard(part.sequence.id)
                active = self._active[part.sequence.id]
                active.mark("resumed" if active.timeline.marks else "started", now_s)

    def _make_ready(self) -> None:
        """A part of what the runner lacks for batches as large as they may be now, so that no stream waits long."""
        if self._runner.make_ready(self._planner.max_batch_size):
            self._board.describe(self._runner.describe())

    def _drain(self) -> None:
        """While draining, give back what has not begun, and when the time is up the rest."""
        if self._gate.state != "draining":
            return
        sequences = self._planner.sequences
        returned = sequences if self._gate.time_is_up else sequences[self._planner.num_running :]
        for sequence in returned:
            self._handover.releases[sequence.id] = sequence.attempt
            self._forget(self._active[sequence.id])
        self._note_drained()

    def _move_blocks(self) -> None:
        """Copy what preempted sequences leave and take up again, before the step writes over it."""
        for direction, pairs in self._planner.take_moves():
            if direction == "out":
                self._runner.swap_out(pairs)
            else:
                self._runner.swap_in(pairs)

    def _start(self, parts: list[StepPart]) -> Step:
        """Begin a forward pass and, where it runs while the loop goes on, make ready for the one after it."""
        started = time.perf_counter()
        wait = self._runner.start(parts)
        step = Step(wait, measure_parts(parts), time.perf_counter() - started)
        if self._runner.runs_ahead:
            self._runner.foresee(self._planner.foresee(parts))
        return step

    def _finish(self, parts: list[StepPart], step: Step) -> list[StepOutput]:
        """Wait for a step. What became of requests that ended meanwhile counts no more."""
        prompt_tokens = sum(p.num_tokens for p in parts if p.sequence.num_computed < p.sequence.num_prompt_tokens)
        started = time.perf_counter()
        try:
            results = step.wait()
            self._starved.clear()
        except OutOfDeviceMemory as error:
            if not self._fails(parts, error):
                return []
            results = [PartResult(error=str(error))] * len(parts)
        seconds, drafter = step.started_s + time.perf_counter() - started, self._planner.drafter
        if drafter:
            seconds += drafter.spent_s
            drafter.observe(parts, results, seconds)
        self._costs.note(step.features, seconds)
        kept = [pair for pair in zip(parts, results, strict=True) if self._holds(pair[0].sequence)]
        outputs = self._planner.apply(*zip(*kept, strict=True)) if kept else []
        num_sampled = sum(output.token_id is not None for output in outputs)
        self._meters.count_step(
            batch_size=len(parts),
            prompt_tokens=prompt_tokens,
            output_tokens=num_sampled,
            seconds=seconds,
            features=step.features,
        )
        return outputs

    def _fails(self, parts: list[StepPart], error: OutOfDeviceMemory) -> bool:
        """Plan less where memory lacks. Whether the request that already ran alone, in the smallest step, fails.

        At first it waits behind all others, who show whether it is to blame. Raises DeviceStarved where nobody gets on.
        """
        if self._planner.shrink():
            logger.warning("The device is out of memory; the batch is made smaller.")
            return False
        sequence = parts[0].sequence
        if not self._holds(sequence):
            return False
        self._starved.append(sequence.id)
        if len(self._starved) >= MOST_STARVED and len(set(self._starved)) > 1:
            raise DeviceStarved from error
        if sequence.id in self._postponed:
            return True
        logger.warning("The device has no memory for request %s alone; others go first.", sequence.id)
        self._postponed.add(sequence.id)
        self._planner.postpone(sequence)
        return False

    def _collect(self, outputs: list[StepOutput]) -> None:
        """Turn tokens into text, and see who has ended; whose text cannot be made ends alone."""
        now_s = time.time()
        for output in outputs:
            if not self._holds(output.sequence):  # it ended at a stop string before this token of the same step
                continue
            active = self._active[output.sequence.id]
            if output.token_id is None:
                self._end(active, "error", "engine_error", output.error or "")
                continue
            try:
                self._emit(active, output, now_s)
            except Exception as error:
                logger.exception("The text of request %s cannot be made", active.request.id)
                self._end(active, "error", "engine_error", f"The text could not be made ({type(error).__name__}).")

    def _emit(self, active: ActiveRequest, output: StepOutput, now_s: float) -> None:
        """Hand over a token with its text; end the request where it was the last one."""
        assert output.token_id is not None
        is_first = active.first_token_s is None and not active.num_resumed
        start = active.num_pushed
        text = active.push(output.token_id, now_s)
        if is_first:
            self._meters.time_to_first_token.observe(now_s - active.request.arrival_s)
        logprobs = [] if output.logprob is None else [output.logprob]
        self._handover.outputs.append(Output(active, start, [output.token_id], [text], logprobs=logprobs))
        if active.stream.stopped or output.finish is not None:
            self._end(active, "stop" if active.stream.stopped else output.finish or "stop")

    def _holds(self, sequence: Running) -> bool:
        """Whether its request has not ended, been cancelled or been given away."""
        active = self._active.get(sequence.id)
        return active is not None and active.sequence is sequence

    def _forget(self, active: ActiveRequest) -> None:
        super()._forget(active)
        self._planner.remove(active.sequence)
        self._stopped.discard(active.request.id)
        self._postponed.discard(active.request.id)

    def _offer_room(self) -> None:
        """Tell the intake what it may claim."""
        if not self._gate.is_open:
            self._intake.offer(NO_ROOM, is_idle=not self._active)
            return
        now = time.monotonic()
        if now >= self._urgent_due_s:  # it counts all blocks, and is looked at less often than this anyway
            self._urgent_due_s = now + URGENT_OFFER_S
            self._urgent = self._planner.urgent_room()
        self._intake.offer(self._planner.room(), is_idle=not self._active, urgent=self._urgent)

    def _idle_s(self) -> float:
        """How long nothing will happen by itself."""
        due_s = self._planner.due_s(time.monotonic())
        return PERIOD_S if due_s is None else min(PERIOD_S, max(0.001, due_s))
