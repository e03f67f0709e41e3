"""An OpenAI-compatible server whose every byte a test decides, on a thread of its own; and requests for it."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec

from inference.messages import InferenceRequest
from scheduling.core.sequence import SamplingParams
from tests.patience import PATIENCE_S

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def frame(data: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()) + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    """An event that carries a piece of a chat's answer."""
    return frame({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


@dataclass(eq=False)
class Call:
    """One request to the server, and the connection on which it is answered."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when the client has closed the connection."""

    async def start(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        lines = [
            f"HTTP/1.1 {status} Status",
            f"content-type: {kind}",
            "transfer-encoding: chunked",
            "connection: close",
        ]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self._write("\r\n".join(lines).encode() + b"\r\n\r\n")

    async def send(self, data: bytes) -> None:
        await self._write(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self, finish: str = "stop", usage: dict[str, int] | None = USAGE) -> None:
        await self.send(piece("", finish))
        if usage is not None:
            await self.send(frame({"choices": [], "usage": usage}))
        await self.send(frame(b"[DONE]"))
        await self._write(b"0\r\n\r\n")

    async def say(self, *texts: str, **end: Any) -> None:
        """A whole answer."""
        await self.start()
        for text in texts:
            await self.send(piece(text))
        await self.end(**end)

    async def refuse(self, status: int, body: bytes, **headers: str) -> None:
        await self.start(status, "application/json", **headers)
        await self.send(body)
        await self._write(b"0\r\n\r\n")

    def drop(self) -> None:
        self.writer.transport.abort()

    async def until_gone(self) -> None:
        """Until the client closes the connection."""
        while await self.reader.read(1):
            pass
        self.gone.set()

    async def _write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


Act = Callable[[Call], Awaitable[None]]


async def three_words(call: Call) -> None:
    await call.say("one", " two", " three")


class Upstream:
    """Answers every POST by `act`, and probes by `probe`: a status and a body."""

    def __init__(self) -> None:
        self.act: Act = three_words
        self.probe: tuple[int, bytes] = (200, b'{"data": [{"id": "other"}]}')
        self.calls: list[Call] = []
        self.num_probes = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "Upstream":
        self._thread.start()
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def open(self) -> None:
        """Listen, on the port that it had before."""
        self._run(self._open())

    def shut(self) -> None:
        """Close the port and all connections."""
        self._run(self._shut())

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left, which some tests want
        finally:
            writer.transport.abort() if task.cancelling() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        call = Call(path, headers, json.loads(raw) if raw else {}, reader, writer)
        if method == "GET":
            self.num_probes += 1
            await call.refuse(*self.probe)
            return
        self.calls.append(call)
        await self.act(call)


def forwarded(request_id: str, *, model: str, max_tokens: int = 20, seed: int = 5, **fields: Any) -> bytes:
    """A request's body as a web process puts it into the queue for an upstream's model."""
    request = InferenceRequest(
        id=request_id,
        model=model,
        tenant="acme",
        priority=3,
        arrival_s=fields.pop("arrival_s", 0.0),
        prompt_token_ids=[],
        max_tokens=max_tokens,
        sampling=SamplingParams(seed=seed),
        reply_to="web-1",
        endpoint=fields.pop("endpoint", "chat.completions"),
        charged_tokens=4 + max_tokens,
        estimated_prompt_tokens=4,
        forwarded=msgspec.json.encode(fields or {"messages": [{"role": "user", "content": "Hello"}]}),
    )
    return msgspec.msgpack.encode(request)
