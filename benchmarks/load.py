"""A light HTTP/1.1 load generator over raw asyncio sockets. Run in a process of its own; prints one JSON line.

`python -m benchmarks.load --port P --path /v1/completions --key K --body JSON --clients N --seconds S [--warmup S]`
"""

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    latencies_s: list[float] = field(default_factory=list)
    failures: int = 0
    frames: int = 0


class Client(asyncio.Protocol):
    """One keep-alive connection that sends the next request as soon as an answer is complete."""

    def __init__(self, request: bytes, tally: Tally, stop_at: float) -> None:
        self._request = request
        self._tally = tally
        self._stop_at = stop_at
        self._buffer = b""
        self._began = 0.0
        self._remaining = -1
        self._chunked = False
        self._started = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._next()

    def _next(self) -> None:
        if time.perf_counter() >= self._stop_at:
            self._transport.close()
            return
        self._buffer, self._started, self._began = b"", False, time.perf_counter()
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is over."""
        if not self.done.done():
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Collect an answer; its end is found by length, or by the last chunk."""
        tally = self._tally
        if not self._started:
            self._buffer += data
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._buffer[:end].lower(), self._buffer[end + 4 :]
            self._started, self._buffer = True, b""
            self._chunked = b"transfer-encoding: chunked" in head
            if not self._chunked:
                length = head.split(b"content-length:")[1].split(b"\r\n")[0]
                self._remaining = int(length)
            tally.failures += not head.startswith(b"http/1.1 200")
            if not data:
                return
        tally.frames += data.count(b"data:")
        if self._chunked:
            self._buffer = (self._buffer + data)[-7:]
            over = self._buffer.endswith(b"\r\n0\r\n\r\n")
        else:
            self._remaining -= len(data)
            over = self._remaining <= 0
        if over:
            tally.latencies_s.append(time.perf_counter() - self._began)
            self._next()


async def run_load(
    *, port: int, path: str, key: str, body: str, clients: int, seconds: float, warmup: float = 0.0
) -> dict[str, float]:
    """Keep `clients` connections busy for `seconds`. Latencies in milliseconds."""
    payload = body.encode()
    request = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    ).encode() + payload
    warm = await _keep_busy(port, request, clients, warmup) if warmup else Tally()
    began = time.perf_counter()
    tally = await _keep_busy(port, request, clients, seconds)
    figures = summarize(tally, time.perf_counter() - began)
    return figures | {"requests_with_warmup": len(tally.latencies_s) + len(warm.latencies_s)}


async def _keep_busy(port: int, request: bytes, clients: int, seconds: float) -> Tally:
    tally = Tally()
    loop = asyncio.get_running_loop()
    stop_at = time.perf_counter() + seconds
    protocols = []
    for _ in range(clients):
        _, protocol = await loop.create_connection(lambda: Client(request, tally, stop_at), "127.0.0.1", port)
        protocols.append(protocol)
    await asyncio.wait_for(asyncio.gather(*(protocol.done for protocol in protocols)), seconds + 60)
    return tally


def summarize(tally: Tally, elapsed_s: float) -> dict[str, float]:
    """Rates a second and latencies in milliseconds."""
    latencies = sorted(tally.latencies_s) or [0.0]
    return {
        "requests": len(tally.latencies_s),
        "failures": tally.failures,
        "requests_per_s": len(tally.latencies_s) / elapsed_s,
        "frames_per_s": tally.frames / elapsed_s,
        "p50_ms": statistics.median(latencies) * 1000,
        "p99_ms": latencies[int(len(latencies) * 0.99) - 1 if len(latencies) > 1 else 0] * 1000,
    }


def main() -> None:
    """Read the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--body", required=True)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warmup", type=float, default=0.0, help="seconds of the same load that are not counted")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(run_load(**vars(options)))))


if __name__ == "__main__":
    main()
