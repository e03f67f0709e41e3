"""An upstream replica: the loop with its threads, put together and run."""

import time
from collections.abc import Collection

import msgspec

from inference.messages import ReplicaStatus
from inference.upstream.forwarded import ForwardedRequest
from inference.upstream.health import UNASKED, Health
from inference.upstream.loop import UpstreamLoop
from inference.upstream.slots import Slots
from inference.upstream.streams import Streams
from inference.worker.active import ActiveRequest, read_request
from inference.worker.commands import CommandRefusedError, Controls
from inference.worker.costs import StepCosts
from inference.worker.gate import Gate
from inference.worker.inbox import Inbox
from inference.worker.membership import Membership
from inference.worker.meters import Meters, Second
from inference.worker.pipe import Pipe
from inference.worker.reporter import Reporter
from inference.worker.sizer import Sizer
from inference.worker.spec import ControlMessage, EngineSpec
from inference.worker.status import StatusBoard, first_status
from scheduling.core.answers import ClaimedRequest


class UpstreamBoard(StatusBoard):
    """Says of the upstream whether it serves."""

    health: Health

    def _status(self, active: Collection[ActiveRequest], now: float) -> ReplicaStatus:
        status = super()._status(active, now)
        problem = self.health.problem
        if not problem:
            return status
        state = "starting" if problem == UNASKED else "unhealthy"
        detail = f"{problem} {status.detail}"
        return msgspec.structs.replace(status, state=state if status.state == "ready" else status.state, detail=detail)


class UpstreamControls(Controls):
    """Refuses what is the server's own business."""

    def obey(self, message: ControlMessage) -> None:
        if message.command == "set_mode":
            raise CommandRefusedError("An upstream server forms its batches itself; its mode cannot be set from here.")
        super().obey(message)


class UpstreamReplica:
    """Serves one deployment until its gate says that it is over."""

    def __init__(self, spec: EngineSpec, key: str, *, pipe: Pipe, inbox: Inbox, reporter: Reporter) -> None:
        deployment = spec.deployment
        self._model = deployment.name
        self._member = member = Membership(spec, inbox, self._read_claimed)
        self._streams = Streams(deployment, key, inbox)
        self._slots = slots = Slots(deployment.max_batch_size)
        meters, gate, health = Meters(Second(started_s=time.time())), Gate(time.monotonic), Health(time.monotonic)
        sizer = Sizer(
            slots,
            meters,
            StepCosts(),
            deployment=deployment,
            num_waiting=lambda: member.intake.depth,
            telemetry=lambda: None,
            memory_limit=lambda _: None,
        )
        board = UpstreamBoard(
            first_status(spec),
            describe(spec),
            planner=slots,
            meters=meters,
            gate=gate,
            intake=member.intake,
            sizer=sizer,
        )
        board.health = health
        self._loop = UpstreamLoop(
            member=member,
            streams=self._streams,
            slots=slots,
            health=health,
            reporter=reporter,
            inbox=inbox,
            pipe=pipe,
            gate=gate,
            controls=UpstreamControls(
                gate, slots, sizer, board.announce, deployment=deployment, drain_s=spec.drain_s, adopted=board.adopt
            ),
            board=board,
            meters=meters,
            sizer=sizer,
        )

    def run(self) -> None:
        """Serve. However the loop ends, what came is sent and the requests are released, where Redis answers."""
        self._streams.start()
        try:
            self._member.serve(self._loop.run, self._slots.attempts)
        finally:
            self._streams.close()

    def _read_claimed(self, claimed: ClaimedRequest, owner: str) -> ActiveRequest:
        now_s = time.time()
        request = read_request(claimed, model=self._model, now_s=now_s)
        return ForwardedRequest(request, claimed, owner=owner, now_s=now_s)


def describe(spec: EngineSpec) -> str:
    """What serves, in a sentence."""
    deployment = spec.deployment
    model = deployment.upstream_model or deployment.name
    return f"Forwards to {deployment.upstream_url} (model {model}); an upstream server's device is not watched."
