"""kill -9 of every process while clients wait: nobody loses an answer, nothing is said twice."""

import asyncio
import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.acceptance.whole_system import MODEL, WholeSystem
from tests.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.acceptance
NUM_STREAMS = 50
MAX_TOKENS = 300
"""More than the engine can have made when the kill comes, however late the clients hear of the first."""
KILL_AFTER_CHUNKS = 300
ENGINE, GPU_WORKER = r"-m inference\.worker", r"celery.*gpu\.gpu-0"


class Progress:
    """Counts chunks over all streams, and tells when enough have come."""

    def __init__(self, enough: int) -> None:
        self.num_chunks = 0
        self.enough = enough
        self.reached = asyncio.Event()

    def count(self) -> None:
        """One more chunk."""
        self.num_chunks += 1
        if self.num_chunks == self.enough:
            self.reached.set()


async def stream_all(client: openai.AsyncOpenAI, progress: Progress, user: str) -> list[tuple[str, int]]:
    """Fifty greedy streams at once: the text of each, and its number of tokens."""

    async def one(number: int) -> tuple[str, int]:
        pieces, num_tokens = [], 0
        async for chunk in await client.completions.create(
            model=MODEL,
            prompt=f"Story {number}. Once upon a time,",
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            user=user,
            extra_body={"ignore_eos": True},
        ):
            pieces += [choice.text for choice in chunk.choices]
            progress.count()
            if chunk.usage:
                num_tokens = chunk.usage.completion_tokens
        return "".join(pieces), num_tokens

    return list(await asyncio.gather(*(one(number) for number in range(NUM_STREAMS))))


async def test_kill_9_of_engine_and_gpu_worker_amid_fifty_streams_changes_no_text(system: WholeSystem) -> None:
    async with system.aclient() as client:
        undisturbed = await stream_all(client, Progress(0), "undisturbed")
        progress = Progress(KILL_AFTER_CHUNKS)
        streams = asyncio.create_task(stream_all(client, progress, "disturbed"))
        await asyncio.wait_for(progress.reached.wait(), PATIENCE_S)
        engine, worker = system.process(ENGINE), system.process(GPU_WORKER)
        for victim in (engine, worker):
            victim.kill()
        disturbed = await asyncio.wait_for(streams, 2 * PATIENCE_S)
    assert [num_tokens for _, num_tokens in disturbed] == [MAX_TOKENS] * NUM_STREAMS
    assert disturbed == undisturbed
    assert system.process(ENGINE).pid != engine.pid
    await asyncio.to_thread(wait_until, lambda: system.num_records("disturbed") >= NUM_STREAMS, "all are recorded")
    assert system.num_records("disturbed") == NUM_STREAMS
    assert system.rows("SELECT id FROM inference_requestrecord WHERE user = 'disturbed' AND attempts > 1")


async def test_kill_9_of_redis_amid_fifty_streams_changes_no_text(system: WholeSystem) -> None:
    async with system.aclient() as client:
        undisturbed = await stream_all(client, Progress(0), "calm")
        progress = Progress(KILL_AFTER_CHUNKS)
        streams = asyncio.create_task(stream_all(client, progress, "shaken"))
        await asyncio.wait_for(progress.reached.wait(), PATIENCE_S)
        system.process(r"valkey-server|redis-server").kill()
        assert await asyncio.wait_for(streams, 2 * PATIENCE_S) == undisturbed
    await asyncio.to_thread(wait_until, lambda: system.num_records("shaken") >= NUM_STREAMS, "all are recorded")
    assert system.num_records("shaken") == NUM_STREAMS


@pytest.mark.parametrize("pattern", [r"controlplane\.webserver", r"celery.*ops@", r"valkey-server|redis-server"])
def test_any_process_that_is_killed_comes_back_and_the_system_answers(system: WholeSystem, pattern: str) -> None:
    victim = system.process(pattern)
    victim.kill()
    victim.wait(PATIENCE_S)

    def answered() -> bool:
        try:
            return bool(
                system.client().completions.create(model=MODEL, prompt="Rain", max_tokens=4, user="healed").choices
            )
        except openai.OpenAIError:
            return False

    wait_until(answered, "the system answers again", period_s=0.2)
    wait_until(lambda: bool(system.process(pattern).pid != victim.pid), "the process is there again")


def test_a_client_that_goes_away_frees_its_place_long_before_its_answer_would_end(system: WholeSystem) -> None:
    wait_until(lambda: system.queue().running == 0, "nothing runs")
    stream = system.client().completions.create(
        model=MODEL, prompt="Snow", max_tokens=900, stream=True, extra_body={"ignore_eos": True}, user="gone"
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: system.queue().running == 0, "the running request is cancelled")
    wait_until(lambda: system.num_records("gone") == 1, "it is recorded")
    ends = system.rows("SELECT state, completion_tokens FROM inference_requestrecord WHERE user = 'gone'")
    ((state, num_tokens),) = ends
    assert state == "cancelled"
    assert 0 < int(str(num_tokens)) < 900


async def test_a_client_that_goes_away_while_it_waits_for_a_whole_answer_or_in_the_queue_is_cancelled(
    system: WholeSystem,
) -> None:
    body = {"model": MODEL, "prompt": "Snow", "max_tokens": 900, "ignore_eos": True, "user": "left"}
    headers = {"Authorization": f"Bearer {system.keys()['checkout']}"}
    async with httpx.AsyncClient(
        base_url=system.url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=100)
    ) as client:
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body, headers=headers)) for _ in range(24)]
        await asyncio.to_thread(
            wait_until, lambda: system.queue().running >= 16 and system.queue().depth > 0, "some run and some wait"
        )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: system.queue().running + system.queue().depth == 0, "all are cancelled")
    await asyncio.to_thread(wait_until, lambda: system.num_records("left") == 24, "all are recorded")
    assert system.rows("SELECT DISTINCT state FROM inference_requestrecord WHERE user = 'left'") == [("cancelled",)]


def test_the_policy_is_switched_under_load_and_every_worker_confirms(system: WholeSystem) -> None:
    stop = threading.Event()
    answers: list[str] = []

    def client() -> None:
        while not stop.is_set():
            answer = system.client("research").completions.create(
                model=MODEL, prompt="Rain", max_tokens=30, extra_body={"ignore_eos": True}, user="switched"
            )
            answers.append(str(answer.choices[0].finish_reason))

    threads = [threading.Thread(target=client) for _ in range(20)]
    for thread in threads:
        thread.start()
    try:
        with contextlib.closing(system.operator()) as operator:
            for name in ("fair", "priority", "fifo"):
                body = {"name": name, "reason": "acceptance test"}
                answer = operator.post(f"/api/v1/models/{MODEL}/policy", json=body)
                assert answer.status_code == 200, answer.text
                assert system.queue().policy == name
                assert "gpu-0" in answer.json()["acknowledgements"]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert answers
    assert set(answers) == {"length"}
    wait_until(lambda: system.num_records("switched") >= len(answers), "all are recorded")
    assert system.num_records("switched") == len(answers)


def test_an_operator_changes_batch_mode_and_size_while_requests_run(system: WholeSystem) -> None:
    stream = system.client().completions.create(
        model=MODEL, prompt="Rain", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with contextlib.closing(system.operator()) as operator:

        def tell(**body: object) -> None:
            answer = operator.post("/api/v1/replicas/gpu-0/control", json={"reason": "acceptance test", **body})
            assert answer.status_code == 200, answer.text
            assert answer.json()["state"] == "ready"

        def replica() -> dict[str, Any]:
            (view,) = operator.get("/api/v1/replicas").json()
            return dict(view)

        before = replica()
        for mode in ("serial", "static", "dynamic", "continuous"):
            tell(command="set_mode", mode=mode)
            wait_until(lambda: replica()["mode"] == mode, f"the replica reports {mode}")  # noqa: B023
        tell(command="set_batch_size", max_batch_size=3)
        wait_until(lambda: replica()["max_batch_size"] == 3, "the replica reports the size")
        tell(command="set_batch_size", max_batch_size=before["max_batch_size"])
    assert sum(1 for _ in stream) >= 1


def test_a_kill_9_of_the_supervisor_leaves_no_process(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(demo_folder / "models" / "demo")
    other = WholeSystem(tmp_path)
    other.start()
    below = other.processes()
    assert len(below) >= 5
    other.stop(signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=PATIENCE_S)
    assert not alive
    assert os.path.lexists(tmp_path / "up.lock")
    other.start()  # the lock went with its holder
    other.stop()
