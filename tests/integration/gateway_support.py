"""What the gateway's tests share: raw HTTP to a web process, a gateway in this process, waiting for a condition."""

import json
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import httpx
import redis
import redis.asyncio

from benchmarks.stack import MODEL, PREFIX, Stack
from benchmarks.tiny_checkpoint import write_tiny_checkpoint
from inference.directory import Directory, DirectoryWatch, KeyConfig, TenantConfig
from inference.gateway.admission import Draft
from inference.gateway.gateway import Gateway
from inference.messages import DeploymentSpec
from scheduling.core.backpressure import BackpressureLimits
from scheduling.core.sequence import SamplingParams
from scheduling.credentials import digest_key
from scheduling.fleet import FleetQueue, QueueSnapshot
from scheduling.keys import Keys
from scheduling.store import execute
from tests.patience import PATIENCE_S

KEYS = Keys(prefix=PREFIX)
QUEUE = FleetQueue(KEYS, MODEL)


@dataclass(slots=True)
class Api:
    """HTTP to a stack's web process."""

    stack: Stack

    def call(self, method: str, path: str, tenant: str | None = "alpha", **options: Any) -> httpx.Response:
        headers = options.pop("headers", {})
        if tenant is not None:
            headers = {"Authorization": f"Bearer {self.stack.api_keys[tenant]}", **headers}
        return httpx.request(method, self.stack.url + path, headers=headers, timeout=PATIENCE_S, **options)

    def complete(self, tenant: str = "alpha", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": "ba be bi", **fields}
        return self.call("POST", "/v1/completions", tenant, json=body)

    def snapshot(self) -> QueueSnapshot:
        with redis.Redis.from_url(self.stack.redis.url) as client:
            return execute(client, QUEUE.snapshot())

    @contextmanager
    def hanging(
        self, tenant: str = "alpha", headers: Mapping[str, str] = MappingProxyType({}), **fields: Any
    ) -> Iterator[socket.socket]:
        """A completion whose client has sent it and reads nothing; it goes away at the end of the block."""
        body = json.dumps({"model": MODEL, "prompt": "ba be bi", "max_tokens": 500, **fields}).encode()
        address = urlsplit(self.stack.url)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n"
            f"Authorization: Bearer {self.stack.api_keys[tenant]}\r\n"
        ) + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with closing(socket.create_connection((address.hostname, address.port))) as client:
            client.sendall(f"{head}\r\n".encode() + body)
            yield client


def code_of(response: httpx.Response) -> str:
    """The error's code; checks that its body is OpenAI's on the way."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-request-id"]
    return str(error["code"])


def frames_of(text: str) -> list[Any]:
    """The JSON frames of an event stream."""
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]


def text_of(text: str) -> str:
    """The text that an event stream of `/v1/completions` carries."""
    return "".join(c["text"] for frame in frames_of(text) for c in frame.get("choices", ()))


KEY = "ps-abcdefgh-0123456789abcdef0123456789abcdef"
TENANT = TenantConfig(name="alpha", max_priority=0)


@asynccontextmanager
async def open_gateway(
    redis_url: str, keys: Keys, folder: Path, tenant: TenantConfig = TENANT, **options: Any
) -> AsyncIterator[Gateway]:
    """A gateway with one tenant, whose key is KEY, and the model `tiny`; estimated waits refuse nobody."""
    digest = digest_key(KEY)
    limits = BackpressureLimits(wait_s=(1e9, 1e9, 1e9, 1e9))
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        watch = DirectoryWatch(client, keys)
        watch.current = Directory(
            keys={digest: KeyConfig(prefix="abcdefgh", digest=digest, tenant=tenant.name, max_priority=0)},
            tenants={tenant.name: tenant},
            deployments={MODEL: DeploymentSpec(name=MODEL, path=str(write_tiny_checkpoint(folder)))},
        )
        gateway = Gateway(redis_url, keys, watch, **{"backpressure": limits, **options})
        await gateway.start()
        yield gateway
        await gateway.stop()
        await watch.stop()


def draft(gateway: Gateway, number: int, priority: int = 2, **fields: Any) -> Draft:
    """A small request."""
    values: dict[str, Any] = {
        "endpoint": "completions",
        "model": gateway.find_model(MODEL),
        "tenant": TENANT,
        "prompt_token_ids": [10, 11],
        "max_tokens": 5,
        "sampling": SamplingParams(),
        "reply_to": gateway.name,
    }
    return Draft(id=f"cmpl-{number}", priority=priority, **(values | fields))
