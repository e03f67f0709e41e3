"""The process of an upstream replica, `python -m inference.upstream`: started and told what to do as an engine is."""

import logging
import os
import sys
import threading

import msgspec

from inference.logs import make_formatter
from inference.upstream.replica import UpstreamReplica, describe
from inference.worker.endings import await_stop, end_process
from inference.worker.inbox import Inbox
from inference.worker.membership import connect
from inference.worker.pipe import Pipe, watch_signals
from inference.worker.reporter import Reporter
from inference.worker.spec import EngineSpec, Notice
from inference.worker.status import first_status
from scheduling.keys import Keys

logger = logging.getLogger("inference.upstream")


class MissingKeyError(Exception):
    """The variable that should hold the upstream's key is not set."""


def main() -> int:
    """Forward until told to stop, give back what is left."""
    pipe = Pipe()
    spec = pipe.read_spec()
    logging.basicConfig(level=spec.log_level)
    logging.getLogger().handlers[0].setFormatter(make_formatter(spec.log_format))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    inbox = Inbox()
    watch_signals(inbox)
    threading.excepthook = end_process
    pipe.follow(inbox)
    status = msgspec.structs.replace(first_status(spec), detail=describe(spec))
    reporter = Reporter(connect(spec), Keys(spec.key_prefix), status, lambda: None)
    reporter.start()
    try:
        replica = UpstreamReplica(spec, read_key(spec), pipe=pipe, inbox=inbox, reporter=reporter)
        logger.info("%s serves %s. %s", spec.replica, spec.deployment.name, describe(spec))
        pipe.send(Notice(state="ready", detail=describe(spec)))
        replica.run()
    except MissingKeyError as error:
        logger.error("%s cannot be served: %s", spec.deployment.name, error)
        reporter.publish(msgspec.structs.replace(status, state="failed", detail=str(error)))
        pipe.send(Notice(state="failed", detail=str(error)))
        await_stop(inbox)
        return 1
    except Exception:
        logger.exception("The replica ends; its requests go back to the queue")
        pipe.send(Notice(state="failed", detail="The replica failed; its log says why."))
        return 2
    finally:
        reporter.close()
    pipe.send(Notice(state="stopped"))
    return 0


def read_key(spec: EngineSpec) -> str:
    """The upstream's key, from the one variable that the deployment names. Raises MissingKeyError."""
    name = spec.deployment.upstream_key
    key = os.environ.get(name, "").strip() if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise MissingKeyError(
            f"The environment variable {name} holds no key on this machine; set it where the gpu worker is started."
        )
    return key


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.exit(status)
