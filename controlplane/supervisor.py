"""Keeps the processes of a system running (with circus): starts them, restarts what dies, stops all of them cleanly."""

import asyncio
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from circus.arbiter import Arbiter
from circus.exc import ConflictError
from circus.watcher import Watcher
from tornado.ioloop import IOLoop

from controlplane.config import ROOT
from controlplane.processes import ProcessSpec

COLOURS = {"redis": 31, "web": 36, "ops": 35}
GPU_COLOUR = 33
CHECK_S = 0.5
YOUNG_S = 15.0
MAX_YOUNG_DEATHS = 5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class PrefixStream:
    """Writes a process's output line by line, each behind the name of the process."""

    def __init__(self, name: str, out: TextIO, *, plain: bool = False) -> None:
        """`plain` leaves the name away, for logs that machines read."""
        colour = out.isatty() and "NO_COLOR" not in os.environ
        self._prefix = f"\033[{COLOURS.get(name, GPU_COLOUR)}m{name:>6} |\033[0m " if colour else f"{name:>6} | "
        if plain:
            self._prefix = ""
        self._out = out
        self._rest: dict[tuple[int, str], bytes] = {}

    def __call__(self, chunk: dict[str, Any]) -> None:
        """Take what was read (`data`) from a pipe (`name`) of a process (`pid`); a started line waits for its end."""
        source = (chunk["pid"], chunk["name"])
        *lines, rest = (self._rest.pop(source, b"") + chunk["data"]).split(b"\n")
        if rest:
            self._rest[source] = rest
        self._write(lines)

    def close(self) -> None:
        """Write the lines that never ended."""
        self._write(self._rest.values())
        self._rest.clear()

    def _write(self, lines: Iterable[bytes]) -> None:
        try:
            for line in lines:
                self._out.write(self._prefix + line.decode(errors="replace").rstrip("\r") + "\n")
            self._out.flush()
        except BrokenPipeError:  # nobody reads any more; the processes go on
            self._out = Path(os.devnull).open("w")  # noqa: SIM115


class Launched:
    """A process that was started once; whoever launched it decides whether it is started again."""

    def __init__(self, watcher: Any) -> None:
        self._watcher = watcher

    @property
    def pid(self) -> int:
        """0 where it could not be started, or has ended."""
        return next(iter(self._watcher.processes), 0)

    def terminate(self) -> None:
        """SIGTERM; a worker drains, and one that is told twice gives up what it drains."""
        if self.pid:
            self._watcher.send_signal(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, to its children too."""
        for process in list(self._watcher.processes.values()):
            self._watcher.send_signal_process(process, signal.SIGKILL, recursive=True)


class Supervisor:
    """Runs processes until a signal comes or `stop` is called. Use it from one asyncio task."""

    def __init__(self, out: TextIO = sys.stdout, *, plain: bool = False) -> None:
        self._out = out
        self._plain = plain
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-"))
        self._stopped = asyncio.Event()
        self._young_deaths: dict[str, int] = {}
        self._spawned: dict[int, float] = {}
        self.failure = ""
        """A sentence, where a process would not stay up."""
        logging.getLogger("circus").setLevel(logging.WARNING)
        self._arbiter = Arbiter(
            [],
            f"ipc://{self._folder}/control",
            f"ipc://{self._folder}/events",
            check_delay=CHECK_S,
            loop=IOLoop.current(),
            proc_name="penstock",
        )
        for signum in STOP_SIGNALS:  # circus has just taken them for an order of its own
            asyncio.get_running_loop().add_signal_handler(signum, self.stop)

    @property
    def stopping(self) -> bool:
        """Whether a signal came or `stop` was called."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End `wait`."""
        self._stopped.set()

    async def wait(self) -> None:
        """Until a signal comes or `stop` is called."""
        await self._stopped.wait()

    async def open(self) -> None:
        """Begin to supervise, with no processes yet."""
        await self._arbiter.start()

    async def start(self, specs: Iterable[ProcessSpec]) -> None:
        """Start processes and keep them running."""
        watchers = [self._watcher(spec) for spec in specs]
        for watcher in watchers:
            watcher.initialize(self._arbiter.evpub_socket, self._arbiter.sockets, self._arbiter)
        self._arbiter.watchers += watchers
        await self._alone(lambda: self._arbiter.start_watchers(watcher_iter_func=lambda: iter(watchers)))

    async def launch(self, spec: ProcessSpec, on_end: Callable[[int], None]) -> Launched:
        """Start a process once; `on_end` hears its exit status, which is negative for a signal."""
        for old in [w for w in self._arbiter.watchers if w.name == spec.name and w.is_stopped()]:
            self._arbiter.watchers.remove(old)

        def hear(*, process_pid: int, exit_code: int, **_: Any) -> bool:
            self._spawned.pop(process_pid, None)
            if not self.stopping:
                on_end(exit_code)
            return True

        watcher = self._watcher(spec, hear)
        watcher.respawn = False
        watcher.initialize(self._arbiter.evpub_socket, self._arbiter.sockets, self._arbiter)
        self._arbiter.watchers.append(watcher)
        await self._alone(lambda: self._arbiter.start_watchers(watcher_iter_func=lambda: iter([watcher])))
        return Launched(watcher)

    def say(self, sentence: str) -> None:
        """Write a line of the supervisor's own between those of the processes."""
        PrefixStream("up", self._out, plain=self._plain)({"pid": 0, "name": "", "data": f"{sentence}\n".encode()})

    async def close(self, last: str = "redis") -> None:
        """Stop all processes at the same time, then the one that the others need."""
        self.stop()

        def others(reverse: bool) -> Iterator[Any]:
            return (w for w in self._arbiter.watchers if w.name != last)

        await self._alone(lambda: self._arbiter.stop_watchers(watcher_iter_func=others))
        await self._alone(self._arbiter.stop)
        await asyncio.sleep(0)  # the arbiter closes its sockets in the loop's next turn
        for signum in STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(signum)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _alone(self, call: Callable[[], Awaitable[Any]]) -> None:
        """Circus does one thing at a time and refuses a second: keep it from checking on processes meanwhile."""
        checks = self._arbiter.ctrl.caller
        checks.stop()
        while True:
            try:
                await call()
            except ConflictError:  # a check that was under way
                await asyncio.sleep(0.02)
            else:
                break
        if not self.stopping:
            checks.start()

    def _watcher(self, spec: ProcessSpec, on_reap: Callable[..., bool] | None = None) -> Any:
        stream = {"stream": PrefixStream(spec.name, self._out, plain=self._plain)}
        return Watcher(
            spec.name,
            shlex.quote(spec.command[0]),
            args=spec.command[1:],
            numprocesses=spec.num_processes,
            working_dir=str(ROOT),
            copy_env=True,
            env={"PYTHONUNBUFFERED": "1", "OTEL_SERVICE_NAME": f"penstock-{spec.name}", **spec.environment},
            use_sockets=True,
            graceful_timeout=spec.stop_s,
            stdout_stream=stream,
            stderr_stream=stream,
            hooks={"after_spawn": (self._on_spawn, True), "after_reap": (on_reap or self._on_reap, True)},
            loop=IOLoop.current(),
        )

    def _on_spawn(self, *, pid: int, **_: Any) -> bool:
        self._spawned[pid] = time.monotonic()
        return True

    def _on_reap(self, *, watcher: Any, process_pid: int, exit_code: int, **_: Any) -> bool:
        """Say that a process died; give up on one that never stays up."""
        age_s = time.monotonic() - self._spawned.pop(process_pid, 0.0)
        if self.stopping or watcher.is_stopping():
            return True
        self.say(
            f"{watcher.name} (process {process_pid}) ended with {exit_code} after {age_s:.0f} s; starting it again."
        )
        deaths = self._young_deaths.get(watcher.name, 0) + 1 if age_s < YOUNG_S and exit_code >= 0 else 0
        self._young_deaths[watcher.name] = deaths
        if deaths >= MAX_YOUNG_DEATHS:
            self.failure = f"{watcher.name} does not stay up; its last lines above say why. Mend that and start again."
            self.stop()
        return True
