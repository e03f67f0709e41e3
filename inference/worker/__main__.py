"""The engine process, `python -m inference.worker`: an EngineSpec on the first line of stdin, then commands."""

import logging
import os
import threading
from functools import partial
from pathlib import Path

import msgspec

from inference.checkpoint import CheckpointError
from inference.engine.draft import load_draft
from inference.engine.errors import DeviceLost, DeviceStarved, ModelLoadError
from inference.engine.runner import ModelRunner
from inference.logs import make_formatter
from inference.tokenization import Tokenizer
from inference.worker.endings import await_stop, end_process, told_to_stop
from inference.worker.engine import Engine
from inference.worker.inbox import Inbox
from inference.worker.membership import connect
from inference.worker.memory import build_memory_model
from inference.worker.nvml import torch_gpus
from inference.worker.pipe import STOP_NOW, Pipe, watch_signals
from inference.worker.reporter import Reporter
from inference.worker.spec import LOST_STATUS, EngineSpec, Notice
from inference.worker.status import first_status
from inference.worker.telemetry import TelemetryReader
from scheduling.keys import Keys

logger = logging.getLogger("inference.worker")

DRIVER_PATIENCE_S = 5.0
"""How long a start waits for the first reading of a GPU."""
LOST_POLL_S = 0.25
LEAVE_S = 5.0
"""How long an engine that lost its GPU may take to give its requests back."""


def main() -> int:
    """Load the model, serve until told to stop, give back what is left."""
    pipe = Pipe()
    spec = pipe.read_spec()
    logging.basicConfig(level=spec.log_level)
    logging.getLogger().handlers[0].setFormatter(make_formatter(spec.log_format))
    inbox = Inbox()
    watch_signals(inbox)
    threading.excepthook = end_process
    pipe.follow(inbox)
    status = first_status(spec)
    telemetry = TelemetryReader()
    reporter = Reporter(connect(spec), Keys(spec.key_prefix), status, telemetry.read)
    telemetry.start()
    reporter.start()
    try:
        if not _await_gpu(spec, pipe, inbox, reporter, telemetry):
            return 0
        _load_and_serve(spec, pipe, inbox, reporter, telemetry)
        if (last := telemetry.read()) is not None and last.lost:
            reporter.publish(msgspec.structs.replace(status, state="failed", detail=last.detail))
            return LOST_STATUS
    except (CheckpointError, ModelLoadError) as error:
        logger.error("%s cannot be served: %s", spec.deployment.name, error)
        reporter.publish(msgspec.structs.replace(status, state="failed", detail=str(error)))
        pipe.send(Notice(state="failed", detail=str(error)))
        await_stop(inbox)
        return 1
    except (DeviceLost, DeviceStarved) as error:
        logger.error("%s The requests go back to the queue.", error, exc_info=error.__cause__)
        reporter.publish(msgspec.structs.replace(status, state="failed", detail=str(error)))
        pipe.send(Notice(state="failed", detail=str(error)))
        return 1  # at once, which gives the device's memory back
    except Exception:
        logger.exception("The engine ends; its requests go back to the queue")
        pipe.send(Notice(state="failed", detail="The engine failed; its log says why."))
        return 2
    finally:
        reporter.close()
    pipe.send(Notice(state="stopped"))
    return 0


def _await_gpu(spec: EngineSpec, pipe: Pipe, inbox: Inbox, reporter: Reporter, telemetry: TelemetryReader) -> bool:
    """Wait until the GPU that is named is there; False when told to stop meanwhile. A silent driver is not awaited."""
    if not spec.gpu:
        return True
    telemetry.follow(spec.device, (spec.gpu,))
    reading = telemetry.first(DRIVER_PATIENCE_S)
    while reading is not None and reading.lost:
        detail = f"{reading.detail} The replica comes back when it does."
        reporter.publish(msgspec.structs.replace(first_status(spec), state="failed", detail=detail))
        pipe.beat()  # it waits, and does not hang
        if told_to_stop(inbox, LOST_POLL_S):
            return False
        reading = telemetry.read()
    reporter.publish(first_status(spec))
    return True


def _load_and_serve(spec: EngineSpec, pipe: Pipe, inbox: Inbox, reporter: Reporter, telemetry: TelemetryReader) -> None:
    path = Path(spec.deployment.path)
    tokenizer = Tokenizer.load(path)
    runner = ModelRunner(spec.deployment, spec.device)
    draft = load_draft(spec.deployment, runner)
    device = str(runner.device)
    on_cuda = device.startswith("cuda")
    gpus = (spec.gpu,) if spec.gpu else torch_gpus(device) if on_cuda else ()
    telemetry.follow(device, gpus, partial(_leave, inbox))
    detail = ". ".join([runner.describe(), *([draft.describe()] if draft else [])])
    logger.info("%s serves %s: %s", spec.replica, spec.deployment.name, detail)
    memory_model = build_memory_model(
        path, dtype=str(runner.dtype).removeprefix("torch."), block_size=runner.block_size
    )
    # A batch size is set for what the device has, so that is known first.
    reading = telemetry.first(DRIVER_PATIENCE_S) if on_cuda else None
    engine = Engine(
        spec,
        runner,
        tokenizer,
        pipe=pipe,
        inbox=inbox,
        reporter=reporter,
        detail=detail,
        memory_model=memory_model,
        on_gpu=on_cuda,
        draft=draft,
    )
    pipe.send(Notice(state="ready", detail=detail, gpu=reading.uuid if reading is not None else ""))
    engine.run()


def _leave(inbox: Inbox, detail: str) -> None:
    """The GPU is lost: give the requests back and end; where a step never returns from it, end all the same."""
    logger.error("%s The requests go back to the queue.", detail)
    inbox.tell(STOP_NOW)
    threading.Timer(LEAVE_S, os._exit, [LOST_STATUS]).start()


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # torch takes seconds to take itself apart, and nothing is left to save
