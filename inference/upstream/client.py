"""An asyncio client of one upstream server: answers as they come, and whether it is there at all."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from inference.messages import DeploymentSpec
from inference.upstream.address import root_of
from inference.upstream.errors import (
    BrokenOff,
    Busy,
    Failed,
    Misconfigured,
    Refused,
    Silent,
    Unreachable,
    UpstreamError,
    read_message,
)
from inference.upstream.events import Delta, EventReader, read_event

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
PROBE_S = 5.0
"""How long a probe may take."""
KEEP_ALIVE_S = 2.0
"""An idle connection is used again within this only: servers close theirs after some seconds, and a request that goes
out as they do is lost."""
MAX_PROBLEM_BYTES = 2**16
"""Of an error's body, and of a list of models."""
MAX_RETRY_S = 60.0
PATHS = {"chat.completions": "/chat/completions", "completions": "/completions"}
BUSY = frozenset({408, 425, 429, 502, 503, 504})
CONTEXT = "context_length_exceeded"
NO_MODEL = "upstream_no_model"
"""A code of ours: the upstream does not know the model, or the address."""


class UpstreamClient:
    """Follows no redirect, obeys no proxy of the environment, and asks for no compression."""

    def __init__(self, deployment: DeploymentSpec, key: str) -> None:
        headers = {"accept-encoding": "identity", "user-agent": "penstock"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        self._key = key
        self._base = deployment.upstream_url
        self._model = deployment.upstream_model or deployment.name
        self._first_token_s = deployment.upstream_first_token_s
        self._gap_s = deployment.upstream_gap_s
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_S),
            follow_redirects=False,
            trust_env=False,
        )

    async def answer(self, endpoint: str, body: bytes, take: Callable[[Delta], None]) -> None:
        """Ask, and give each delta to `take`, until the answer ends. Raises UpstreamError.

        Only what was generated counts against the bounds of time: an upstream that sends signs of life alone is silent.
        """
        has_begun = False
        try:
            async with asyncio.timeout(self._first_token_s) as patience:
                headers = {"content-type": "application/json", "accept": "text/event-stream"}
                url = self._base + PATHS[endpoint]
                async with self._http.stream("POST", url, content=body, headers=headers) as response:
                    await self._check(response)
                    reader = EventReader()
                    async for piece in response.aiter_raw():
                        for data in reader.push(piece):
                            delta = read_event(data, secret=self._key)
                            if delta is None:
                                return
                            if delta.is_token or delta.finish:
                                has_begun = True
                                patience.reschedule(asyncio.get_running_loop().time() + self._gap_s)
                            take(delta)
        except TimeoutError as error:
            what, bound_s = ("next", self._gap_s) if has_begun else ("first", self._first_token_s)
            raise Silent(f"The upstream did not send its {what} token within {bound_s:g} s.") from error
        except httpx.ConnectTimeout as error:
            raise Unreachable(f"The upstream did not accept a connection within {CONNECT_S:g} s.") from error
        except httpx.ConnectError as error:
            raise Unreachable("The upstream cannot be reached.") from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise BrokenOff(f"The upstream broke off the connection ({type(error).__name__}).") from error

    async def probe(self, *, lists_model: bool = False) -> None:
        """Whether the server would serve: `/models`, or `/health` where there is none. Raises UpstreamError.

        With `lists_model` the model has to be on the list; without, a server may know it by other names than it lists.
        """
        try:
            async with asyncio.timeout(PROBE_S):
                status, body = await self._get(f"{self._base}/models")
                if status in (404, 405, 501):
                    status, body = await self._get(f"{root_of(self._base)}/health")
                elif status == 200 and lists_model:
                    self._find_model(body)
        except TimeoutError as error:
            raise Silent(f"The upstream did not answer a probe within {PROBE_S:g} s.") from error
        except httpx.HTTPError as error:
            raise Unreachable(f"The upstream cannot be reached ({type(error).__name__}).") from error
        if status != 200:
            raise self._problem(status, body, "")

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _get(self, url: str) -> tuple[int, bytes]:
        async with self._http.stream("GET", url) as response:
            return response.status_code, await _read_bounded(response)

    async def _check(self, response: httpx.Response) -> None:
        """Raises UpstreamError where the answer is no stream of events."""
        if response.status_code != 200:
            body = await _read_bounded(response)
            raise self._problem(response.status_code, body, response.headers.get("retry-after", ""))
        kind, encoding = (response.headers.get(name, "") for name in ("content-type", "content-encoding"))
        if not kind.startswith("text/event-stream") or encoding not in ("", "identity"):
            raise Failed("The upstream does not stream: it answered with another kind of content.")

    def _problem(self, status: int, body: bytes, retry_after: str) -> UpstreamError:
        said, code = read_message(body, secret=self._key)
        if said:
            logger.log(logging.INFO if status < 500 else logging.WARNING, "The upstream answered %d: %s", status, said)
        if status in (401, 403):
            return Misconfigured(f"The upstream does not accept this replica's key ({status}).")
        if status < 400:
            return Misconfigured(f"The upstream answers with {status}, a redirect perhaps, which is not followed.")
        if status in BUSY:
            return Busy(f"The upstream turns requests away ({status}).", _seconds(retry_after))
        if status >= 500:
            return Failed(f"The upstream failed ({status}).")
        code = NO_MODEL if status == 404 else CONTEXT if code == CONTEXT else ""
        return Refused(said or f"The upstream refused the request ({status}).", code)

    def _find_model(self, body: bytes) -> None:
        try:
            listed: Any = msgspec.json.decode(body)["data"]
            names = [str(one["id"]) for one in listed]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
            return
        if not any(name == self._model or name.startswith(f"{self._model}:") for name in names):
            has = ", ".join(names[:5]) or "none"
            raise Misconfigured(f"The upstream has no model {self._model!r}; it has {has[:200]}.")


async def _read_bounded(response: httpx.Response) -> bytes:
    body = b""
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > MAX_PROBLEM_BYTES:
            break
    return body


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for in seconds; 0 where it names a date or nothing."""
    return min(MAX_RETRY_S, float(retry_after)) if retry_after.isascii() and retry_after.isdecimal() else 0.0
