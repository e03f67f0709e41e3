"""What to send: made-up conversations, or the arrivals and lengths of a recorded trace."""

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from controlplane.demo import TENANTS, DemoTenant
from inference.demo.corpus import conversation, plain_text

STREAMED = 0.7
UNUSUAL_PRIORITY = 0.15


class BadTrace(Exception):  # noqa: N818
    """A trace needs a header row and the columns arrival_s, tenant, prompt_tokens, output_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One request to send. `at_s` counts from the start, where arrivals are given."""

    tenant: str
    path: str
    body: dict[str, Any]
    at_s: float = 0.0

    @property
    def stream(self) -> bool:
        """Whether the answer comes token by token."""
        return bool(self.body["stream"])


def _priority(tenant: DemoTenant, random: Random) -> str:
    """Mostly the tenant's usual one, sometimes a lower one."""
    level = tenant.usual_priority
    if random.random() < UNUSUAL_PRIORITY:
        level = random.choice([p for p in type(level) if p >= tenant.max_priority])
    return level.name.lower()


def conversations(tenant: DemoTenant, model: str, random: Random) -> Iterator[Shot]:
    """Endless chats of a tenant, short ones and long ones, streamed and not."""
    while True:
        stream = random.random() < STREAMED
        body: dict[str, Any] = {
            "model": model,
            "messages": conversation(random)[:-1],
            "max_tokens": min(400, int(random.lognormvariate(4.5, 0.8)) + 8),
            "temperature": random.choice((0.0, 0.7)),
            "priority": _priority(tenant, random),
            "stream": stream,
            "user": f"{tenant.name}-{random.randrange(100)}",
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        yield Shot(tenant=tenant.name, path="/v1/chat/completions", body=body)


def read_trace(path: Path, model: str, rate: float, max_model_len: int, random: Random) -> Iterator[Shot]:
    """The trace's requests at `rate` times its speed, lengths cut to what the model can hold. Raises BadTrace.

    The trace's tenants take the demo's tenants in turn, as they appear.
    """
    seen: dict[str, DemoTenant] = {}
    room = max_model_len // 2 - 8
    words = " ".join(plain_text(random) for _ in range(200)).split()
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for row in csv.DictReader(file):
            try:
                tenant = seen.setdefault(row["tenant"], TENANTS[len(seen) % len(TENANTS)])
                num_prompt, num_output = int(row["prompt_tokens"]), int(row["output_tokens"])
                at_s = float(row["arrival_s"]) / rate
            except (KeyError, ValueError) as error:
                raise BadTrace(f"{BadTrace.__doc__} {path} has not: {error}.") from None
            start = random.randrange(len(words) // 2)
            body: dict[str, Any] = {
                "model": model,
                # A word is a token and a bit.
                "prompt": " ".join(words[start : start + max(1, int(min(num_prompt, room) / 1.4))]),
                "max_tokens": max(1, min(num_output, room)),
                "ignore_eos": True,
                "priority": _priority(tenant, random),
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            yield Shot(tenant=tenant.name, path="/v1/completions", body=body, at_s=at_s)
