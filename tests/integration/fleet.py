"""Plays a web process for tests: puts requests into the queue and collects what comes back on a reply stream."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from inference.messages import BatchEvent, Finish, InferenceRequest, ReplicaStatus, RequestEvent, SequenceUpdate
from scheduling import store
from scheduling.core.policies import build_policy
from scheduling.core.request import QueueEntry
from scheduling.core.sequence import SamplingParams
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from tests.patience import PATIENCE_S

Event = TypeVar("Event", RequestEvent, BatchEvent)
Found = TypeVar("Found")
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@dataclass
class Answer:
    """One request's tokens, put together by number."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish: Finish | None = None
    attempts: set[int] = field(default_factory=set)
    num_repeated: int = 0

    @property
    def text(self) -> str:
        assert self.finish is not None
        return "".join(self.texts) + self.finish.text

    def take(self, update: SequenceUpdate) -> None:
        self.attempts.add(update.attempt)
        assert len(update.texts) == len(update.token_ids)
        for i, (token_id, text) in enumerate(zip(update.token_ids, update.texts, strict=True), update.start):
            if i < len(self.token_ids):
                assert (self.token_ids[i], self.texts[i]) == (token_id, text), "a repeated token differs"
                self.num_repeated += 1
                continue
            assert i == len(self.token_ids), "a token is missing"
            self.token_ids.append(token_id)
            self.texts.append(text)
        if update.finish is not None:
            assert self.finish in (None, update.finish)
            self.finish = update.finish


class FleetClient:
    """Plays the part of a web process."""

    def __init__(self, client: Any, keys: Keys, model: str) -> None:
        self.client = client
        self.keys = keys
        self.model = model
        self.queue = FleetQueue(keys, model)
        self.answers: dict[str, Answer] = {}
        self._last = b"0"
        self._policy = build_policy("fifo")
        self._revision = 0

    def use_policy(self, name: str) -> None:
        """Make a policy active in a queue that has none, and place by it."""
        self._policy, self._revision = build_policy(name), 1
        assert store.execute(self.client, self.queue.init_policy(name, self._policy.params, 1))

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        *,
        sampling: SamplingParams = GREEDY,
        priority: int = 3,
        body: bytes | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """With a deadline, the request is dropped when that passes while it waits."""
        now = time.time()
        request = InferenceRequest(
            id=request_id,
            model=self.model,
            tenant="acme",
            priority=priority,
            arrival_s=now,
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            reply_to="web-1",
            charged_tokens=len(prompt) + max_tokens,
        )
        entry = QueueEntry(
            id=request_id,
            tenant="acme",
            priority=priority,
            arrival_s=now,
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            deadline_s=deadline_s,
            drop_expired=deadline_s is not None,
        )
        command = self.queue.enqueue(
            entry,
            self._policy.place(entry),
            revision=self._revision,
            body=msgspec.msgpack.encode(request) if body is None else body,
            depth_limit=10_000,
            reply_to="web-1",
        )
        assert store.execute(self.client, command).status == "queued"
        self.answers[request_id] = Answer()

    def read(self, block_ms: int = 50) -> None:
        """Take what is on the reply stream."""
        reply = self.client.xread({self.keys.replies("web-1"): self._last}, block=block_ms)
        for _, messages in reply or []:
            for message_id, fields in messages:
                self._last = message_id
                for update in msgspec.msgpack.decode(fields[b"m"], type=list[SequenceUpdate]):
                    self.answers[update.request_id].take(update)

    def until(self, condition: Callable[[], Found], patience_s: float = PATIENCE_S) -> Found:
        """Read until the condition holds, and return what it gave."""
        end = time.monotonic() + patience_s
        while not (found := condition()):
            assert time.monotonic() < end, f"not in time: {self._progress()}"
            self.read()
        return found

    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers.values())

    def _progress(self) -> dict[str, int]:
        return {name: len(answer.token_ids) for name, answer in self.answers.items() if not answer.finish}

    def until_finished(self, patience_s: float = PATIENCE_S) -> None:
        """Until all have their ends, and the queue knows: an engine tells it after the client."""
        self.until(
            lambda: all(answer.finish for answer in self.answers.values()) and not self.num_running(), patience_s
        )

    def num_running(self) -> int:
        return store.execute(self.client, self.queue.snapshot()).running

    def status(self, replica: str) -> ReplicaStatus | None:
        packed = self.client.get(self.keys.replica(replica))
        return None if packed is None else msgspec.msgpack.decode(packed, type=ReplicaStatus)

    def until_state(self, replica: str, state: str) -> ReplicaStatus:
        """What the replica says when it is in this state."""
        status = self.until(lambda: s if (s := self.status(replica)) and s.state == state else None)
        assert status is not None
        return status

    def events(self, kind: type[Event]) -> list[Event]:
        """Events of one kind on the history stream."""
        decode = msgspec.msgpack.Decoder(list[RequestEvent | BatchEvent]).decode
        messages = self.client.xrange(self.keys.history)
        return [event for _, fields in messages for event in decode(fields[b"m"]) if isinstance(event, kind)]
