"""The Celery worker's end of the pipe: starts an engine process, sends it commands, and notices its end."""

import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import IO, Any

import msgspec

from inference.worker.spec import Ack, Beat, CommandName, ControlMessage, EngineSpec, Notice, Report

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


class EngineGoneError(Exception):
    """The engine process has ended."""


class EngineProcess:
    """One engine process, from its start to its end. A child of this process by spawn; it ends when this one does."""

    def __init__(self, command: Sequence[str], spec: EngineSpec) -> None:
        """`command` reads an EngineSpec from stdin; in a session of its own, so that Ctrl-C does not reach it.

        Raises OSError where the process cannot be started.
        """
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._lock = threading.Lock()
        self._acks: dict[int, Future[Ack]] = {}
        self._next_id = 1
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.notice: Notice | None = None
        """The last one: what it serves, or why it cannot."""
        self.heard_s = time.monotonic()
        """When it last said anything; its loop does once a second. Before it is ready, when it was started."""
        self.owner = ""
        """Whose requests it holds; empty until it may have claimed some."""
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name="engine", daemon=True)
        self._reader.start()
        with contextlib.suppress(EngineGoneError):  # it ended at once, which the reader notices
            self._write(spec)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: CommandName, arguments: dict[str, Any], timeout_s: float) -> Ack:
        """Send a command and wait until it is obeyed. Raises EngineGoneError, or TimeoutError after `timeout_s`."""
        future: Future[Ack] = Future()
        with self._lock:
            number = self._next_id
            self._next_id += 1
            self._acks[number] = future
        try:
            self._write(ControlMessage(id=number, command=command, arguments=arguments))
            if self.ended.is_set():
                raise EngineGoneError(f"The engine process {self.pid} has ended.")
            return future.result(timeout_s)
        finally:
            self._acks.pop(number, None)

    def tell(self, command: CommandName, arguments: dict[str, Any]) -> None:
        """Send a command and wait for nothing. Raises EngineGoneError."""
        self._write(ControlMessage(id=0, command=command, arguments=arguments))

    def hang_up(self) -> None:
        """Close the pipe, as the end of this process would; the engine gives its requests back and ends."""
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def kill(self) -> None:
        """End it at once; others take its requests when its lease ends."""
        self._process.kill()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit status; None where it still runs after `timeout_s`."""
        return self._process.returncode if self.ended.wait(timeout_s) else None

    def _write(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        try:
            with self._lock:
                self._process.stdin.write(_encode(message) + b"\n")
                self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise EngineGoneError(f"The engine process {self.pid} has ended.") from error

    def _read(self, lines: IO[bytes]) -> None:
        """Until the pipe ends, which is when the process does."""
        decoder = msgspec.json.Decoder(Report)
        for line in lines:
            try:
                self._note(decoder.decode(line))
            except msgspec.MsgspecError:
                logger.exception("The engine said what cannot be read: %r", line[:200])
        self._process.wait()
        lines.close()
        with self._lock:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what was written after the process ended is lost with it
                self._process.stdin.close()
        self.ended.set()
        for future in list(self._acks.values()):
            if not future.done():
                future.set_exception(EngineGoneError(f"The engine process {self.pid} has ended."))

    def _note(self, report: Report) -> None:
        self.heard_s = time.monotonic()
        match report:
            case Ack():
                future = self._acks.get(report.id)
                if future is not None and not future.done():
                    future.set_result(report)
            case Beat():
                self.owner = report.owner
            case Notice():
                self.notice = report
                if report.state == "ready":
                    self.ready.set()
