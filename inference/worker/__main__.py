"""The engine process, `python -m inference.worker`: an EngineSpec on the first line of stdin, then commands."""

import logging
import os
import threading
import time
from pathlib import Path

import msgspec

from inference.checkpoint import CheckpointError
from inference.engine.errors import ModelLoadError
from inference.engine.runner import ModelRunner
from inference.tokenization import Tokenizer
from inference.worker.engine import Engine, connect
from inference.worker.inbox import Inbox, Told
from inference.worker.pipe import Pipe, watch_signals
from inference.worker.reporter import Reporter
from inference.worker.spec import EngineSpec, Notice
from inference.worker.status import first_status
from inference.worker.telemetry import TelemetryReader, open_source
from scheduling.keys import Keys

logger = logging.getLogger("inference.worker")

RETRY_S = 30.0
"""How long a process that cannot serve its checkpoint waits before it ends, to be started again."""


def main() -> int:
    """Load the model, serve until told to stop, give back what is left."""
    pipe = Pipe()
    spec = pipe.read_spec()
    logging.basicConfig(level=spec.log_level, format="{asctime} {levelname} {name}: {message}", style="{")
    inbox = Inbox()
    watch_signals(inbox)
    threading.excepthook = _end_process
    pipe.follow(inbox)
    status = first_status(spec)
    telemetry = TelemetryReader()
    reporter = Reporter(connect(spec), Keys(spec.key_prefix), status, telemetry.read)
    telemetry.start()
    reporter.start()
    try:
        _load_and_serve(spec, pipe, inbox, reporter, telemetry)
    except (CheckpointError, ModelLoadError) as error:
        logger.error("%s cannot be served: %s", spec.deployment.name, error)
        reporter.publish(msgspec.structs.replace(status, state="failed", detail=str(error)))
        pipe.send(Notice(state="failed", detail=str(error)))
        _await_stop(inbox)
        return 1
    except Exception:
        logger.exception("The engine ends; its requests go back to the queue")
        pipe.send(Notice(state="failed", detail="The engine failed; its log says why."))
        return 2
    finally:
        reporter.close()
    pipe.send(Notice(state="stopped"))
    return 0


def _load_and_serve(spec: EngineSpec, pipe: Pipe, inbox: Inbox, reporter: Reporter, telemetry: TelemetryReader) -> None:
    path = Path(spec.deployment.path)
    tokenizer = Tokenizer.load(path)
    runner = ModelRunner(spec.deployment, spec.device)
    telemetry.follow(open_source(str(runner.device)))
    detail = runner.describe()
    logger.info("%s serves %s: %s", spec.replica, spec.deployment.name, detail)
    engine = Engine(spec, runner, tokenizer, pipe=pipe, inbox=inbox, reporter=reporter, detail=detail)
    pipe.send(Notice(state="ready", detail=detail))
    engine.run()


def _end_process(failure: threading.ExceptHookArgs) -> None:
    """A thread failed, and the loop cannot go on without it: end, so that the lease runs out and all starts anew."""
    name = failure.thread.name if failure.thread else "a thread"
    logger.critical("%s failed; the engine ends", name, exc_info=failure.exc_value)
    logging.shutdown()
    os._exit(2)


def _await_stop(inbox: Inbox) -> None:
    """Show the failed state for a while, rather than load what cannot be loaded over and over."""
    deadline = time.monotonic() + RETRY_S
    while (left_s := deadline - time.monotonic()) > 0:
        for word in inbox.read(left_s):
            if isinstance(word, Told) and word.message.command == "stop":
                return


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # torch takes seconds to take itself apart, and nothing is left to save
