"""What the ops worker does for an operator by itself: it turns a bad policy back under load, and replays traffic."""

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import openai
import pytest

from tests.acceptance.whole_system import MODEL, WholeSystem
from tests.patience import wait_until

pytestmark = pytest.mark.acceptance
MAX_TOKENS = 100
"""So many that the engine's work is what clients wait for."""
NUM_URGENT, NUM_PATIENT = 60, 6
"""Far more urgent clients than the engine has slots: while they go on, some urgent request always waits."""
NUM_CALM = 100
NUM_REPLAYED = 200


class Crowd:
    """Clients that ask again as soon as they have their answer."""

    def __init__(self, system: WholeSystem, user: str) -> None:
        self._system = system
        self._user = user
        self._over = asyncio.Event()
        self.num_asked = 0
        self.took_s: list[float] = []
        self.answers: list[tuple[str, int]] = []

    async def run(self, during: Callable[[], Awaitable[None]]) -> None:
        """Keep asking until `during` has ended; every request that was begun is answered."""
        async with self._system.aclient("checkout") as urgent, self._system.aclient("nightly") as patient:
            clients = [self._ask(urgent, "realtime") for _ in range(NUM_URGENT)]
            clients += [self._ask(patient, "bulk") for _ in range(NUM_PATIENT)]
            asking = asyncio.gather(*clients)
            try:
                await during()
            finally:
                self._over.set()
                await asking

    async def _ask(self, client: openai.AsyncOpenAI, priority: str) -> None:
        while not self._over.is_set():
            self.num_asked += 1
            began_s = time.monotonic()
            answer = await client.completions.create(
                model=MODEL,
                prompt="Rain",
                max_tokens=MAX_TOKENS,
                user=self._user,
                extra_body={"ignore_eos": True, "priority": priority},
            )
            self.took_s.append(time.monotonic() - began_s)
            assert answer.usage
            self.answers.append((str(answer.choices[0].finish_reason), answer.usage.completion_tokens))


def guards(operator: httpx.Client) -> list[dict[str, Any]]:
    return list(operator.get("/api/v1/operator/guards", params={"model": MODEL}).raise_for_status().json())


def switch(operator: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = operator.post(path, json={"name": "fifo", "reason": "acceptance test", **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_a_policy_that_starves_some_is_turned_back_in_its_watch_time_and_nothing_is_lost(
    system: WholeSystem,
) -> None:
    crowd = Crowd(system, "guarded")
    with contextlib.closing(system.operator()) as operator:
        switch(operator, f"/api/v1/models/{MODEL}/policy")

        def turn_to_a_bad_one() -> dict[str, Any]:
            wait_until(lambda: len(crowd.took_s) >= NUM_CALM, "clients are answered")
            # Whoever is last in line waits without end then: on a slow machine too, twice as long as anybody now.
            bound_s = max(3.0, 2 * max(crowd.took_s))
            guard = {"metric": "oldest_wait_s", "threshold": bound_s, "watch_s": math.ceil(5 * bound_s)}
            path = "/api/v1/operator/guarded-switch"
            switched = switch(operator, path, model=MODEL, name="priority", params={"level_s": 600}, guard=guard)
            assert switched["state"] == "watching"
            wait_until(lambda: guards(operator)[0]["state"] != "watching", "the watch ends", period_s=0.2)
            return switched

        async def during() -> None:
            switched.update(await asyncio.to_thread(turn_to_a_bad_one))

        switched: dict[str, Any] = {}
        await crowd.run(during)
        (watched,) = [one for one in guards(operator) if one["revision"] == switched["revision"]]
        revisions = operator.get("/api/v1/operator/revisions", params={"model": MODEL}).raise_for_status().json()
    assert watched["state"] == "rolled back", watched
    assert "Longest wait since the change was" in watched["verdict"]
    assert watched["after"]["oldest_wait_s"] > watched["threshold"]
    assert watched["before"]["requests"] >= NUM_CALM / 2
    assert watched["before"]["queue_p99_s"] is not None
    assert watched["after"]["waiting"] > 0
    back = next(one for one in revisions["revisions"] if one["revision"] == watched["rolled_back_to"])
    assert (back["name"], back["by"], system.queue().policy) == ("fifo", "guard", "fifo")
    assert datetime.fromisoformat(back["applied_at"]) <= datetime.fromisoformat(watched["ends_at"])
    assert len(crowd.answers) == crowd.num_asked
    assert set(crowd.answers) == {("length", MAX_TOKENS)}
    await asyncio.to_thread(wait_until, lambda: system.num_records("guarded") >= crowd.num_asked, "all are recorded")
    ended = "SELECT request_id, state, completion_tokens FROM inference_requestrecord WHERE user = 'guarded'"
    rows = system.rows(ended)
    assert len({request_id for request_id, *_ in rows}) == len(rows) == crowd.num_asked
    assert {tuple(rest) for _, *rest in rows} == {("finished", MAX_TOKENS)}


async def test_a_replay_is_run_by_the_ops_worker_which_shows_how_far_it_is(system: WholeSystem) -> None:
    since = datetime.now(UTC) - timedelta(hours=1)
    crowd = Crowd(system, "replayed")

    def enough() -> bool:
        return len(system.rows(f"SELECT id FROM inference_requestrecord LIMIT {NUM_REPLAYED}")) == NUM_REPLAYED

    async def during() -> None:
        await asyncio.to_thread(wait_until, enough, "clients are answered")

    await crowd.run(during)
    with contextlib.closing(system.operator()) as operator:
        named = ("fifo", "priority", "edf", "size", "wrr", "fair", "hierarchical")
        candidates: list[dict[str, Any]] = [{"policy": name} for name in named]
        candidates.append({"policy": "priority", "params": {"level_s": 1}})
        body = {"model": MODEL, "start": since.isoformat(), "end": datetime.now(UTC).isoformat()}
        asked = operator.post("/api/v1/operator/what-if", json={**body, "candidates": candidates})
        assert asked.status_code == 202, asked.text
        seen: list[tuple[str, float]] = []

        def read() -> dict[str, Any]:
            run = dict(operator.get(f"/api/v1/operator/what-if/{asked.json()['id']}").raise_for_status().json())
            seen.append((run["state"], run["progress"]))
            return run if run["state"] in ("done", "failed") else {}

        run = await asyncio.to_thread(wait_until, read, "the replay ends")
    assert (run["state"], run["error"], run["progress"]) == ("done", "", 1.0)
    shares = [share for state, share in seen if state == "running"]
    assert shares == sorted(shares)
    assert any(0 < share < 1 for share in shares), [key for key, _ in itertools.groupby(seen)]
    assert [one["policy"] for one in run["result"]["candidates"]] == [one["policy"] for one in candidates]
    assert run["result"]["candidates"][-1]["params"] == {"level_s": 1}
    assert run["result"]["requests"] >= NUM_REPLAYED
