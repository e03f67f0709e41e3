"""Sends requests over HTTP and counts what comes back."""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from random import Random

import httpx

from controlplane.load.tally import Tally
from controlplane.load.traffic import Shot

REFUSED = {429, 503}
LONGEST_PAUSE_S = 5.0
TIMEOUT_S = 300.0
MAX_RUNNING = 2000


class Sender:
    """Sends shots with the tenants' keys."""

    def __init__(self, base_url: str, keys: Mapping[str, str], tally: Tally) -> None:
        limits = httpx.Limits(max_connections=MAX_RUNNING, max_keepalive_connections=MAX_RUNNING)
        self._client = httpx.AsyncClient(base_url=base_url, timeout=TIMEOUT_S, limits=limits)
        self._keys = keys
        self._tally = tally
        self.num_running = 0

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def keep_sending(self, shots: Iterator[Shot], until: float) -> None:
        """One client: the next request when the last is answered, after the pause that a refusal asks for."""
        random = Random(id(shots))  # noqa: S311
        for shot in shots:
            if time.monotonic() >= until:
                return
            pause_s = await self.send(shot)
            if pause_s:
                await asyncio.sleep(
                    min(pause_s, LONGEST_PAUSE_S, max(0.0, until - time.monotonic())) * random.uniform(0.5, 1)
                )

    async def replay(self, shots: Iterator[Shot], duration_s: float) -> None:
        """Send every request at its time, whatever became of those before."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for shot in shots:
                if shot.at_s > duration_s:
                    return
                await asyncio.sleep(max(0.0, started + shot.at_s - time.monotonic()))
                if self.num_running >= MAX_RUNNING:
                    self._tally.of(shot.tenant).failed[f"not sent: {MAX_RUNNING} requests are running already"] += 1
                else:
                    tasks.create_task(self.send(shot))

    async def send(self, shot: Shot) -> float:
        """One request and its whole answer; for how long a refusal asks to wait, in seconds."""
        tally = self._tally.of(shot.tenant)
        tally.num_sent += 1
        self.num_running += 1
        started = time.monotonic()
        headers = {"Authorization": f"Bearer {self._keys[shot.tenant]}"}
        try:
            async with self._client.stream("POST", shot.path, json=shot.body, headers=headers) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    return self._count_error(shot, answer)
                await self._read(shot, answer, started)
        except httpx.HTTPError as error:
            tally.failed[type(error).__name__] += 1
            return 1.0
        finally:
            self.num_running -= 1
        tally.end_to_end_s.append(time.monotonic() - started)
        return 0.0

    def _count_error(self, shot: Shot, answer: httpx.Response) -> float:
        tally = self._tally.of(shot.tenant)
        try:
            error = answer.json()["error"]
            reason = f"{answer.status_code} {error.get('code') or error.get('type')}"
        except (ValueError, KeyError, TypeError):
            reason = str(answer.status_code)
        (tally.refused if answer.status_code in REFUSED else tally.failed)[reason] += 1
        return float(answer.headers.get("retry-after", 1))

    async def _read(self, shot: Shot, answer: httpx.Response, started: float) -> None:
        tally = self._tally.of(shot.tenant)
        if not shot.stream:
            body = json.loads(await answer.aread())
            self._tally.tokens(shot.tenant, body["usage"]["completion_tokens"])
            tally.num_ok += 1
            return
        num_chunks, usage = 0, None
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                tally.failed[str(event["error"].get("code"))] += 1
                return
            if event.get("usage"):
                usage = event["usage"]["completion_tokens"]
            if event["choices"]:
                if num_chunks == 0:
                    tally.first_token_s.append(time.monotonic() - started)
                num_chunks += 1
                self._tally.tokens(shot.tenant, 1)
        if usage is not None:  # chunks may hold several tokens
            self._tally.tokens(shot.tenant, usage - num_chunks)
        tally.num_ok += 1
