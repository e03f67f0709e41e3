"""An engine: the loop with its threads, put together, run, and taken apart."""

import logging
import secrets
import time

import redis

from inference.logprobs import read_logprobs
from inference.tokenization import TextStream, Tokenizer
from inference.worker.active import ActiveRequest, open_request
from inference.worker.commands import Controls
from inference.worker.costs import StepCosts
from inference.worker.gate import Gate
from inference.worker.inbox import Inbox
from inference.worker.loop import EngineLoop, Runner
from inference.worker.membership import Membership
from inference.worker.memory import DeviceMemory
from inference.worker.meters import Meters, Second
from inference.worker.pipe import Pipe
from inference.worker.reporter import Reporter
from inference.worker.sizer import Sizer
from inference.worker.spec import EngineSpec
from inference.worker.status import StatusBoard, first_status
from scheduling import store
from scheduling.core.answers import ClaimedRequest
from scheduling.core.blocks import BlockAllocator
from scheduling.core.planner import StepPlanner
from scheduling.core.prefix import PrefixCache
from scheduling.core.sizing.memory_model import MemoryModel
from scheduling.core.speculation import NGrams, Source, Speculation
from scheduling.core.swap import SwapSpace
from scheduling.core.triggers import parse_trigger
from scheduling.keys import Keys

logger = logging.getLogger(__name__)


class Engine:
    """Serves one deployment until its gate says that it is over."""

    def __init__(
        self,
        spec: EngineSpec,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        pipe: Pipe,
        inbox: Inbox,
        reporter: Reporter,
        detail: str = "",
        memory_model: MemoryModel | None = None,
        on_gpu: bool = False,
        draft: Source | None = None,
    ) -> None:
        """`draft` guesses where the deployment wants a draft model."""
        self._model = spec.deployment.name
        self._keys = Keys(spec.key_prefix)
        self._tokenizer = tokenizer
        member = self._member = Membership(spec, inbox, self._read_claimed)
        costs = StepCosts(
            block_bytes=runner.block_bytes, block_size=runner.block_size, swap_bytes_per_s=runner.swap_bytes_per_s
        )
        planner = _build_planner(spec, runner, costs, draft)
        meters = Meters(Second(started_s=time.time()))
        gate = Gate(time.monotonic)
        beside_bytes = draft.memory_bytes if draft else 0
        memory = DeviceMemory(memory_model, planner, beside_bytes, on_gpu=on_gpu)
        sizer = Sizer(
            planner,
            meters,
            costs,
            deployment=spec.deployment,
            num_waiting=lambda: member.intake.depth,
            telemetry=reporter.read_telemetry,
            memory_limit=memory.limit,
        )
        board = StatusBoard(
            first_status(spec), detail, planner=planner, meters=meters, gate=gate, intake=member.intake, sizer=sizer
        )
        controls = Controls(
            gate, planner, sizer, board.announce, deployment=spec.deployment, drain_s=spec.drain_s, adopted=board.adopt
        )
        self.loop = EngineLoop(
            planner=planner,
            runner=runner,
            lease=member.lease,
            intake=member.intake,
            outbox=member.outbox,
            reporter=reporter,
            inbox=inbox,
            pipe=pipe,
            gate=gate,
            controls=controls,
            board=board,
            meters=meters,
            costs=costs,
            sizer=sizer,
        )

    def run(self) -> None:
        """Serve. However the loop ends, its last steps are sent and its requests released, where Redis answers.

        Raises DeviceStarved.
        """
        self._member.serve(self.loop.run, self.loop.suspects)

    def _read_claimed(self, claimed: ClaimedRequest, owner: str) -> ActiveRequest:
        active = open_request(
            claimed,
            owner=owner,
            model=self._model,
            new_stream=lambda sampling: TextStream.of(self._tokenizer, sampling),
            now_s=time.time(),
        )
        if active.num_resumed and active.request.sampling.logprobs is not None:
            try:
                found = store.execute(self._member.client, read_logprobs(self._keys, self._model, claimed.id))
                active.logprobs = found[: active.num_resumed]
            except redis.RedisError as error:  # then the request ends with an error, rather than the claim hang here
                logger.warning("The log probabilities of request %s cannot be read: %s", claimed.id, error)
        return active


def _build_planner(spec: EngineSpec, runner: Runner, costs: StepCosts, draft: Source | None) -> StepPlanner:
    deployment = spec.deployment
    allocator = BlockAllocator(runner.num_blocks, runner.block_size)
    prefix, swap = None, None
    source = NGrams() if deployment.speculation == "ngram" else draft
    if deployment.prefix_cache != "off":
        is_apart = deployment.prefix_cache == "per_tenant"
        prefix = PrefixCache(allocator, key=secrets.token_bytes(32), per_tenant=is_apart)
    if runner.num_host_blocks:
        swap = SwapSpace(runner.num_host_blocks, runner.block_size, costs.swap_pays)
    return StepPlanner(
        deployment.mode,
        deployment.max_batch_size,
        deployment.step_tokens,
        allocator,
        runner.max_model_len,
        time.monotonic,
        eos_token_ids=runner.eos_token_ids,
        prefix=prefix,
        swap=swap,
        trigger=parse_trigger(deployment.triggers),
        long_prefill_threshold=deployment.long_prefill_threshold,
        drafter=Speculation(deployment.num_draft_tokens, source) if source else None,
    )
