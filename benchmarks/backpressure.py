"""How soon a queue that fills pushes back: from the first request over a threshold to the first refusal.

    python -m benchmarks.backpressure [--rounds 10] [--json FILE]

Two web processes, one Redis, no engine. In each round requests of high priority fill the queue to the depth from which
bulk is refused; then a bulk request goes to the process that took the last of them, or to the other one. The time runs
from the answer to the request that reached the threshold until the refusal has arrived, over HTTP.
"""

import argparse
import asyncio
import json
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gateway import machine
from benchmarks.stack import MODEL, Stack, running_stack

QUEUE_LIMIT = 40
THRESHOLD = 20
"""Half of the bound: where level 1 begins."""
PATIENCE_S = 10.0


async def measure(stack: Stack, urls: tuple[str, str], client: httpx.AsyncClient) -> dict[str, Any]:
    """One round: fill through the first process, be refused by the second."""
    filling, refusing = urls
    async with AsyncExitStack() as open_streams:
        for _ in range(THRESHOLD):
            answer = await _ask(client, filling, stack, "high")
            open_streams.push_async_callback(answer.aclose)
            answer.raise_for_status()
        began = time.perf_counter()
        refused = await _ask(client, refusing, stack, "bulk")
        elapsed_s = time.perf_counter() - began
        code = json.loads(await refused.aread())["error"]["code"]
        await refused.aclose()
        if refused.status_code != 503:
            raise RuntimeError(f"The request over the threshold was answered with {refused.status_code}.")
    await _until_calm(stack, urls, client)
    return {"ms": elapsed_s * 1000, "code": code, "retry_after_s": int(refused.headers["retry-after"])}


async def _ask(client: httpx.AsyncClient, url: str, stack: Stack, priority: str) -> httpx.Response:
    body = {"model": MODEL, "prompt": "ba", "max_tokens": 5, "stream": True, "priority": priority}
    request = client.build_request("POST", f"{url}/v1/completions", json=body, headers=_headers(stack))
    return await client.send(request, stream=True)


async def _until_calm(stack: Stack, urls: tuple[str, str], client: httpx.AsyncClient) -> None:
    """Wait until nothing waits and no process shows a level."""
    deadline = time.monotonic() + PATIENCE_S
    for url in urls:
        while True:
            (queue,) = (await client.get(f"{url}/api/v1/queues", headers=_headers(stack))).json()
            if queue["depth"] == 0 and queue["backpressure"] == "none":
                break
            if time.monotonic() > deadline:
                raise RuntimeError("The queue did not drain.")
            await asyncio.sleep(0.05)


def _headers(stack: Stack) -> dict[str, str]:
    return {"Authorization": f"Bearer {stack.api_keys['team']}"}


async def run(rounds: int) -> dict[str, Any]:
    """All rounds, both ways by turns."""
    with running_stack(PENSTOCK_QUEUE_LIMIT=str(QUEUE_LIMIT)) as stack, stack.more_webs(1) as (other,):
        found: dict[str, list[dict[str, Any]]] = {"same process": [], "other process": []}
        async with httpx.AsyncClient(timeout=30) as client:
            for _ in range(rounds):
                found["same process"].append(await measure(stack, (stack.url, stack.url), client))
                found["other process"].append(await measure(stack, (stack.url, other), client))
    return {"machine": machine(), "aim_ms": 10.0} | {
        name: {
            "p50_ms": statistics.median(round_["ms"] for round_ in results),
            "max_ms": max(round_["ms"] for round_ in results),
            "codes": sorted({round_["code"] for round_ in results}),
            "retry_after_s": sorted({round_["retry_after_s"] for round_ in results}),
        }
        for name, results in found.items()
    }


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(run(options.rounds))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
