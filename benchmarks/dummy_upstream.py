"""An OpenAI-compatible server that answers at once with a fixed text: what peers are put in front of.

`python -m benchmarks.dummy_upstream PORT`
"""

import asyncio
import json
import sys

NUM_TOKENS = 16
BASE = {"id": "chatcmpl-dummy", "created": 1, "model": "tiny"}


def _whole() -> bytes:
    message = {"role": "assistant", "content": " ba" * NUM_TOKENS}
    usage = {"prompt_tokens": 5, "completion_tokens": NUM_TOKENS, "total_tokens": 5 + NUM_TOKENS}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    body = json.dumps({**BASE, "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _frames() -> list[bytes]:
    """The stream as HTTP chunks: head, one per token, the end."""
    parts = [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"]
    deltas: list[tuple[dict[str, str], str | None]] = [({"content": " ba"}, None)] * NUM_TOKENS + [({}, "length")]
    for delta, reason in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        frame = f"data: {json.dumps({**BASE, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
        parts.append(f"{len(frame):x}\r\n{frame}\r\n".encode())
    parts.append(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    return parts


WHOLE, FRAMES = _whole(), _frames()


class Upstream(asyncio.Protocol):
    """One connection; requests do not overlap."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        lower = head.lower()
        length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in lower else 0
        if len(body) < length:
            return
        self._buffer = body[length:]
        if b'"stream":true' in body.replace(b" ", b""):
            for frame in FRAMES:
                self._transport.write(frame)
        else:
            self._transport.write(WHOLE)


async def serve(port: int) -> None:
    """Serve for ever."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
