"""The engine's end of the pipe to its Celery worker: commands come in on stdin, acks and notices go out on stdout."""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from typing import BinaryIO

import msgspec

from inference.worker.inbox import Inbox
from inference.worker.spec import Beat, ControlMessage, EngineSpec, Report

logger = logging.getLogger(__name__)

ORPHAN_GRACE_S = 10
"""How long an engine process whose parent is gone may take to release its requests before it ends itself."""
PR_SET_PDEATHSIG = 1
BEAT_S = 1.0

_encode = msgspec.json.Encoder().encode
STOP_NOW = ControlMessage(id=0, command="stop", arguments={"drain_s": 0})


class Pipe:
    """Both directions. Takes stdin and stdout for itself; prints of libraries go to stderr from then on."""

    def __init__(self) -> None:
        self._lines: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        self._lock = threading.Lock()
        self._beat_s = 0.0
        os.dup2(2, 1)
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, 0)
        os.close(devnull)

    def read_spec(self) -> EngineSpec:
        """The first line. Raises msgspec.ValidationError."""
        return msgspec.json.decode(self._lines.readline(), type=EngineSpec)

    def send(self, report: Report) -> None:
        """Tell the parent; a parent that is gone hears nothing, and the reader notices that by itself."""
        try:
            with self._lock:
                self._out.write(_encode(report) + b"\n")
        except BrokenPipeError:
            logger.warning("The Celery worker does not read any more.")

    def beat(self, owner: str = "") -> None:
        """The loop turns: tell the parent once a second, whose watchdog kills an engine that is silent for long."""
        now_s = time.monotonic()
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self.send(Beat(owner=owner))

    def follow(self, inbox: Inbox) -> None:
        """Pass commands on from a thread; stop the engine when the pipe ends, for then the parent is gone."""
        threading.Thread(target=self._follow, args=(inbox,), name="pipe", daemon=True).start()

    def _follow(self, inbox: Inbox) -> None:
        decoder = msgspec.json.Decoder(ControlMessage)
        for line in self._lines:
            try:
                inbox.tell(decoder.decode(line))
            except msgspec.MsgspecError:
                logger.exception("A command cannot be read: %r", line[:200])
        inbox.tell(STOP_NOW)
        threading.Event().wait(ORPHAN_GRACE_S)
        os._exit(3)


def watch_signals(inbox: Inbox) -> None:
    """Release and end on SIGTERM, which the kernel also sends when the parent thread dies (Linux); ignore Ctrl-C.

    Ctrl-C reaches the whole terminal, but when to stop is the Celery worker's decision.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: inbox.tell(STOP_NOW))
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
