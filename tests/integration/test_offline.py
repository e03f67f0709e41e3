"""`/v1/files` and `/v1/batches` through the official client: answered in the background, behind live requests."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import msgspec
import openai
import pytest
import redis
from openai.types import Batch

from benchmarks.stack import MODEL, ROOT, Stack, ended, running_stack
from controlplane.offline.room import UNSERVED
from inference.messages import InferenceRequest
from inference.shedding import end_dropped
from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.store import execute
from tests.integration.gateway_support import KEYS, QUEUE, Api, code_of
from tests.patience import PATIENCE_S, wait_until

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack({"alpha": {}, "beta": {}, "few": {"rpm": 2}}, PENSTOCK_MAX_FILE_BYTES="20000") as stack:
        yield stack


class OpsWorker:
    """The ops worker, whose beat runs offline work every second."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "celery", "-A", "controlplane", "worker", "-n", "ops@here"]
        command += ["-Q", "ops", "-B", "--pool", "threads", "--concurrency", "4", "--loglevel", "WARNING"]
        command += ["--without-mingle", "--without-gossip"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=self._stack.environment)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def worker(stack: Stack) -> Iterator[OpsWorker]:
    worker = OpsWorker(stack)
    yield worker
    worker.stop()


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with make_client(stack, "alpha") as client:
        yield client


def make_client(stack: Stack, tenant: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key=stack.api_keys[tenant], max_retries=0, timeout=PATIENCE_S)


def line(number: int, *, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    fields = {"model": MODEL, "prompt": "ba be", "max_tokens": 3 + number % 4} | body
    return {"custom_id": f"row-{number}", "method": "POST", "url": url, "body": fields}


def start(client: openai.OpenAI, lines: list[Any], endpoint: Any = "/v1/completions") -> Batch:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in lines)
    file = client.files.create(file=("work.jsonl", BytesIO(text.encode())), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"why": "test"}
    )


def until_ended(client: openai.OpenAI, batch: Batch) -> Batch:
    def look() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ENDED else None

    done = wait_until(look, period_s=0.1)
    assert done is not None
    return done


def rows(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


def test_every_line_is_answered_and_one_that_cannot_run_fails_alone(
    stack: Stack, worker: OpsWorker, client: openai.OpenAI
) -> None:
    lines = [line(i) for i in range(40)]
    lines[7]["body"]["model"] = "nothing"
    lines[9]["body"]["stream"] = True
    with ended(stack.start_engine()):
        batch = start(client, lines)
        assert (batch.status, batch.metadata) == ("validating", {"why": "test"})
        done = until_ended(client, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (40, 38, 2)
    assert batch.created_at <= (done.in_progress_at or 0) <= (done.completed_at or 0)
    answers = {row["custom_id"]: row["response"]["body"] for row in rows(client, done.output_file_id)}
    assert answers.keys() == {f"row-{i}" for i in range(40)} - {"row-7", "row-9"}
    for number in (0, 1, 2, 3):
        answer = answers[f"row-{number}"]
        assert answer["usage"]["completion_tokens"] == 3 + number % 4
        assert len(answer["choices"][0]["text"].split()) == 3 + number % 4
    failed = {row["custom_id"]: row["response"] for row in rows(client, done.error_file_id)}
    assert {name: (r["status_code"], r["body"]["error"]["code"]) for name, r in failed.items()} == {
        "row-7": (404, "model_not_found"),
        "row-9": (400, "invalid_value"),
    }
    assert next(iter(client.batches.list(limit=1))).id == batch.id
    with make_client(stack, "beta") as other:
        assert not list(other.batches.list())
        for call in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(batch.id)
        with pytest.raises(openai.NotFoundError):
            other.files.content(done.output_file_id or "")


def test_a_chat_batch_survives_the_death_of_the_ops_process(
    stack: Stack, worker: OpsWorker, client: openai.OpenAI
) -> None:
    lines = [line(i, url="/v1/chat/completions", messages=[{"role": "user", "content": "ba"}]) for i in range(60)]
    for row in lines:
        del row["body"]["prompt"]
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.2)):
        batch = start(client, lines, "/v1/chat/completions")
        wait_until(lambda: (counts := client.batches.retrieve(batch.id).request_counts) and counts.completed > 5)
        worker.kill()
        counts = client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert counts.completed < 60
        worker.start()
        done = until_ended(client, batch)
    answers = rows(client, done.output_file_id)
    assert len(answers) == len({row["custom_id"] for row in answers}) == 60
    assert all(row["response"]["body"]["choices"][0]["message"]["content"] for row in answers)
    assert len({row["response"]["request_id"] for row in answers}) == 60


def test_live_requests_do_not_wait_behind_a_batch(stack: Stack, worker: OpsWorker, client: openai.OpenAI) -> None:
    api = Api(stack)
    live = api.call("POST", "/api/v1/requests", "beta", json={"model": MODEL, "prompt": "ba", "max_tokens": 5})
    assert live.status_code == 202
    batch = start(client, [line(i, max_tokens=200) for i in range(100)])
    wait_until(lambda: api.snapshot().by_priority == {3: 1, 5: 1})
    seen: list[dict[int, int]] = []

    def look() -> bool:
        seen.append(api.snapshot().by_priority)
        return len(seen) > 15  # two steps of the runner

    wait_until(look, period_s=0.1)
    assert all(by_priority == {3: 1, 5: 1} for by_priority in seen)
    api.call("DELETE", live.headers["location"], "beta")
    wait_until(lambda: api.snapshot().by_priority == {5: UNSERVED})
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = until_ended(client, batch)
    assert done.status == "cancelled"
    assert (done.cancelling_at or 0) <= (done.cancelled_at or 0)
    wait_until(lambda: api.snapshot().depth == 0)
    assert {row["error"]["code"] for row in rows(client, done.error_file_id)} == {"batch_cancelled"}
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


def test_a_file_that_cannot_be_used_fails_the_batch_with_its_lines(
    stack: Stack, worker: OpsWorker, client: openai.OpenAI
) -> None:
    twice = until_ended(client, start(client, [line(1), "{broken", line(1), line(2, url="/v1/chat/completions")]))
    empty = until_ended(client, start(client, [" "]))
    assert twice.status == empty.status == "failed"
    assert twice.errors is not None
    assert [error.line for error in twice.errors.data or []] == [2, 3, 4]
    assert "occurs twice" in str(twice.errors.data)


def test_a_line_that_was_cancelled_fails_alone_and_one_that_was_shed_is_sent_again(
    stack: Stack, worker: OpsWorker, client: openai.OpenAI
) -> None:
    api = Api(stack)
    batch = start(client, [line(i) for i in range(3)])
    wait_until(lambda: api.snapshot().by_priority == {5: 3})
    was = api.call("DELETE", f"/api/v1/requests/{batch.id}-1").json()["was"]
    assert was == "queued"
    urgent = QueueEntry(id="urgent", tenant="beta", priority=0, arrival_s=time.time(), prompt_tokens=1, max_tokens=1)
    with redis.Redis.from_url(stack.redis.url) as store:
        active = execute(store, QUEUE.active_policy())
        place = build_policy(active.name, active.params).place(urgent)
        answer = execute(
            store, QUEUE.enqueue(urgent, place, revision=active.revision, body=b"", depth_limit=2, shed=True)
        )
        [shed] = answer.shed
        assert shed.id == f"{batch.id}-3"
        request = msgspec.msgpack.decode(shed.body, type=InferenceRequest)
        assert request.comes_again, "so its first end is no failure in the history"
        end_dropped(store, QUEUE, answer.shed)
        execute(store, QUEUE.cancel(urgent.id))
    with ended(stack.start_engine()):
        done = until_ended(client, batch)
    failed = {row["custom_id"]: row["response"]["status_code"] for row in rows(client, done.error_file_id)}
    assert failed == {"row-0": 499}
    ids = {row["custom_id"]: row["response"]["request_id"] for row in rows(client, done.output_file_id)}
    assert ids == {"row-1": f"{batch.id}-2", "row-2": f"{batch.id}-3-1"}


def test_a_tenant_s_limit_is_asked_once_and_not_with_every_line(
    stack: Stack, worker: OpsWorker, client: openai.OpenAI
) -> None:
    api = Api(stack)
    with make_client(stack, "few") as few:
        batch = start(few, [line(i) for i in range(20)])
        wait_until(lambda: api.snapshot().by_priority == {5: 2})
        other = start(client, [line(1, model="nothing")])
        assert until_ended(client, other).status == "completed", "the runner has made rounds since"
        with redis.Redis.from_url(stack.redis.url) as store:
            refusals = int(store.hget(KEYS.refusals, f"{MODEL}|few|requests_per_minute") or 0)
        few.batches.cancel(batch.id)
        until_ended(few, batch)
    assert refusals == 1


def test_a_line_that_no_parser_or_database_takes_fails_its_own_batch_alone(
    stack: Stack, worker: OpsWorker, client: openai.OpenAI
) -> None:
    deep = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": ' + "[" * 5000
    half = json.dumps(line(1) | {"custom_id": "\ud800"})
    broken = [start(client, [row]) for row in (deep, half)]
    with ended(stack.start_engine()):
        assert until_ended(client, start(client, [line(1)])).status == "completed"
    assert {until_ended(client, batch).status for batch in broken} == {"failed"}


def test_files_are_bounded_listed_and_deleted(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    assert client.files.retrieve(file.id).filename == "a.jsonl"
    assert client.files.content(file.id).read() == b"{}"
    assert file.id in [found.id for found in client.files.list(limit=2)]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.BadRequestError, match="at most 20000 bytes"):
        client.files.create(file=("b.jsonl", b"x" * 20_001), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("c.jsonl", b"x"), purpose="assistants")
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=client.base_url, api_key="ps-no") as nobody:
        nobody.files.list()


def test_a_batch_is_refused_for_another_endpoint_window_or_file(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    given: dict[str, Any] = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    for wrong in (
        {"endpoint": "/v1/embeddings"},
        {"completion_window": "1h"},
        {"metadata": {"x": "y" * 600}},
        {"metadata": {"x": "a\0"}},
    ):
        with pytest.raises(openai.BadRequestError):
            client.batches.create(**(given | wrong))
    with pytest.raises(openai.NotFoundError):
        client.batches.create(**(given | {"input_file_id": "file-none"}))


def test_a_form_that_cannot_be_read_is_the_client_s_error(stack: Stack) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for content in (b"--y\r\n", b"", b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n"):
        answer = Api(stack).call("POST", "/v1/files", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert Api(stack).call("PUT", "/v1/files").status_code == 405
    for path in ("/v1/files/", "/v1/files/a/b", "/v1/filesystem", "/v1/batches/a/b"):
        answer = Api(stack).call("GET", path)
        assert (answer.status_code, code_of(answer)) == (404, "unknown_url")
    assert Api(stack).call("POST", "/v1/batches", content=b"[]").status_code == 400


def test_a_stranger_s_file_is_refused_before_it_is_read(stack: Stack) -> None:
    address = urlsplit(stack.url)
    head = f"POST /v1/files HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 20000\r\n\r\n"
    with closing(socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)) as stranger:
        stranger.sendall(head.encode() + b"the rest never comes")
        assert stranger.recv(4096).startswith(b"HTTP/1.1 401")
