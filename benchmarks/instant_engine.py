"""An engine process that answers at once: the real queue protocol around a model that only counts.

Run as `python -m benchmarks.instant_engine --redis URL --prefix P --model M --checkpoint DIR`.
"""

import argparse
import time
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import redis

from inference.messages import Finish, InferenceRequest, ReplicaStatus, RequestEvent, SequenceUpdate
from inference.shedding import end_dropped
from inference.tokenization import Tokenizer
from scheduling.fleet import FleetQueue
from scheduling.keys import Keys
from scheduling.limits import TenantLimits
from scheduling.store import Command, execute_many

LEASE_S = 10.0
STATUS_PERIOD_S = 0.25
CLAIM_PERIOD_S = 0.002
"""While others run, new requests are asked for at most this often."""
MAX_REPLIES = 20_000
encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Running:
    """A claimed request and what it has said."""

    request: InferenceRequest
    attempt: int
    tokens: list[int]
    claimed_s: float
    cancelled: bool = False
    resend: bool = field(default=False)

    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return self.cancelled or len(self.tokens) >= self.request.max_tokens


class InstantEngine:
    """Claims, says `tokens_per_step` words of each running request per step (0: all of them), finishes."""

    def __init__(
        self, client: redis.Redis, keys: Keys, model: str, tokenizer: Tokenizer, *, slots: int, tokens_per_step: int
    ) -> None:
        self._client = client
        self._keys = keys
        self._queue = FleetQueue(keys, model)
        self._limits = TenantLimits(keys)
        self._model = model
        self._slots = slots
        self._tokens_per_step = tokens_per_step
        self._owner = f"instant:{time.time_ns()}"
        self._started_s = time.time()
        self._vocabulary = _speakable(tokenizer)
        self._texts = {token_id: tokenizer.decode([token_id]) for token_id in self._vocabulary}
        self._running: dict[str, Running] = {}
        self._next_status_s = 0.0
        self._next_claim_s = 0.0
        self._num_tokens = 0
        self._num_steps = 0

    def run(self, step_s: float) -> None:
        """Serve for ever; at most one step per `step_s`. Waits for a Redis that is away."""
        while True:
            try:
                self._turn()
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(0.1)
            if step_s:
                time.sleep(step_s)

    def _turn(self) -> None:
        now = time.time()
        commands: list[Command[Any]] = []
        ended = self._speak(now, commands)
        if ended:  # as a worker does: what follows from an end goes after what the client waits for
            execute_many(self._client, commands)
            commands = [command for running, finish in ended.values() for command in self._settle(running, finish, now)]
        if now >= self._next_status_s:
            commands.extend(self._status_commands(now))
        asks = now >= self._next_claim_s or len(self._running) == len(ended)
        if asks:
            self._next_claim_s = now + CLAIM_PERIOD_S
            room = self._slots - len(self._running) + len(ended)
            commands.append(self._queue.take_cancels(self._owner))
            commands.append(self._queue.claim(self._owner, max_requests=room, max_tokens=2**40, lease_s=LEASE_S))
        replies = execute_many(self._client, commands)
        for request_id in ended:
            del self._running[request_id]
        if asks:
            end_dropped(self._client, self._queue, replies[-1].dropped)
            self._take(replies[-1], now)
            for request_id in replies[-2]:
                if request_id in self._running:
                    self._running[request_id].cancelled = True
        if not self._running:
            self._client.blpop([self._keys.bell(self._model)], timeout=STATUS_PERIOD_S)

    def _take(self, claimed: Any, now: float) -> None:
        for item in claimed.requests:
            request = msgspec.msgpack.decode(item.body, type=InferenceRequest)
            self._running[item.id] = Running(request, item.attempt, item.tokens, now, resend=bool(item.tokens))

    def _speak(self, now: float, commands: list[Command[Any]]) -> dict[str, tuple[Running, Finish]]:
        """One step: journal first, then one message per web process, then the ends. Answers who ended."""
        appends: list[tuple[str, int, int, bytes]] = []
        messages: dict[str, list[SequenceUpdate]] = defaultdict(list)
        ends: list[Command[Any]] = []
        ended: dict[str, tuple[Running, Finish]] = {}
        for request_id, running in self._running.items():
            update = self._step(running)
            if not running.cancelled:
                appends.append((request_id, running.attempt, update.start, array("i", update.token_ids).tobytes()))
            if running.request.reply_to:
                messages[running.request.reply_to].append(update)
            if update.finish is not None:
                ended[request_id] = (running, update.finish)
                ends.append(self._end(running, update.finish))
        if appends:
            commands.append(self._queue.journal(self._owner, appends))
        for web, updates in messages.items():
            key = self._keys.replies(web)
            commands.append(Command(("XADD", key, "MAXLEN", "~", MAX_REPLIES, "*", "m", encode(updates)), bytes))
        commands.extend(ends)
        self._num_steps += bool(self._running)
        return ended

    def _step(self, running: Running) -> SequenceUpdate:
        request = running.request
        start = 0 if running.resend else len(running.tokens)
        running.resend = False
        if not running.cancelled:
            said = len(running.tokens)
            count = min(request.max_tokens - said, self._tokens_per_step or request.max_tokens)
            words = self._vocabulary
            running.tokens.extend(words[(said + i) % len(words)] for i in range(count))
            self._num_tokens += count
        new = running.tokens[start:]
        texts = [self._texts[token_id] for token_id in new]
        finish = None
        if running.is_over():
            reason = "cancelled" if running.cancelled else "length"
            finish = Finish(reason, len(request.prompt_token_ids), len(running.tokens))  # type: ignore[arg-type]
        return SequenceUpdate(request.id, running.attempt, start, new, texts, finish)

    def _end(self, running: Running, finish: Finish) -> Command[bool]:
        request = running.request
        return self._queue.finish(
            self._owner,
            request.id,
            running.attempt,
            state="cancelled" if running.cancelled else "finished",
            used_tokens=finish.prompt_tokens + finish.completion_tokens,
            finish=encode(finish),
            output="".join(self._texts[token_id] for token_id in running.tokens),
        )

    def _settle(self, running: Running, finish: Finish, now: float) -> list[Command[Any]]:
        """The tenant's limits and the history, once a request has ended."""
        request = running.request
        used = finish.prompt_tokens + finish.completion_tokens
        event = RequestEvent(
            id=request.id,
            model=request.model,
            tenant=request.tenant,
            priority=request.priority,
            endpoint=request.endpoint,
            state="cancelled" if running.cancelled else "finished",
            finish_reason=finish.reason,
            arrival_s=request.arrival_s,
            claimed_s=running.claimed_s,
            first_token_s=now,
            finished_s=now,
            prompt_tokens=finish.prompt_tokens,
            completion_tokens=finish.completion_tokens,
            max_tokens=request.max_tokens,
            attempts=running.attempt,
            replica="instant",
            traceparent=request.traceparent,
        )
        return [
            self._limits.settle(request.tenant, request.id, refund_tokens=max(0, request.charged_tokens - used)),
            Command(("XADD", self._keys.history, "MAXLEN", "~", 100_000, "*", "m", encode([event])), bytes),
        ]

    def _status_commands(self, now: float) -> list[Command[Any]]:
        self._next_status_s = now + STATUS_PERIOD_S
        status = ReplicaStatus(
            replica="instant",
            model=self._model,
            host="localhost",
            pid=0,
            state="ready",
            time_s=now,
            started_s=self._started_s,
            max_batch_size=self._slots,
            kv_blocks_total=1000,
            kv_blocks_used=min(1000, len(self._running)),
            steps=self._num_steps,
            output_tokens=self._num_tokens,
        )
        return [
            Command(("SET", self._keys.replica("instant"), encode(status), "PX", 1500), bool),
            Command(("ZADD", self._keys.replicas, now, "instant"), int),
            self._queue.renew(self._owner, LEASE_S),
        ]


def _speakable(tokenizer: Tokenizer) -> list[int]:
    """Tokens whose text is a plain word after a space, so that it is the same alone and within a text."""
    texts = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
    return [i for i, text in texts if text.isascii() and text.startswith(" ") and text.strip().isalnum()]


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, default=0, help="0: the whole answer in one step")
    parser.add_argument("--step-s", type=float, default=0.0)
    options = parser.parse_args()
    engine = InstantEngine(
        redis.Redis.from_url(options.redis),
        Keys(prefix=options.prefix),
        options.model,
        Tokenizer.load(options.checkpoint),
        slots=options.slots,
        tokens_per_step=options.tokens_per_step,
    )
    engine.run(options.step_s)


if __name__ == "__main__":
    main()
