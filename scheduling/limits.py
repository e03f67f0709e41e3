"""A tenant's limits in Redis: requests and tokens a minute (token buckets), concurrent requests. Sans-IO, as the queue.

Each bucket holds one minute's worth, starts full and fills evenly; `scheduling.core.admission` is the same arithmetic
in Python. All charges of a request are taken, or none. Calls may be repeated: a request is charged once while it lives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from scheduling.keys import Keys
from scheduling.store import Command, load_script

T = TypeVar("T")
Reason = Literal["", "requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Whether a request may enter, and what is left. None where a limit is not set.

    A request of more tokens than the bucket ever holds is refused each time; compare with `limit_tokens` beforehand.
    `reset_*_s` is the time until a bucket is full again.
    """

    ok: bool
    reason: Reason
    retry_after_s: float
    remaining_requests: int | None
    remaining_tokens: int | None
    limit_requests: int | None
    limit_tokens: int | None
    reset_requests_s: float
    reset_tokens_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    """What a tenant uses now: concurrent requests, and what its buckets hold (None: no such limit in use lately)."""

    running: int
    remaining_requests: int | None
    remaining_tokens: int | None


class TenantLimits:
    """Commands on the limits of all tenants."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def acquire(
        self,
        tenant: str,
        request_id: str,
        *,
        rpm: int | None,
        tpm: int | None,
        concurrency: int | None,
        tokens: int,
        now: float | None = None,
        tpd: int | None = None,
        others: Sequence[str] = (),
    ) -> Command[Admission]:
        """Charge one request, `tokens` and a concurrency slot, or nothing and say why. None: unlimited.

        `tpd` is the budget of tokens of a day, which begins at midnight UTC. `others` are ids of further answers to the
        same request: each is charged as a request and has its slot, all or none, and `tokens` are those of all; to
        acquire one of them afterwards charges nothing. Each is settled by itself.
        """

        def read(reply: list[Any]) -> Admission:
            return _read_admission(reply, rpm, tpm)

        return self._script("acquire", read, tenant, request_id, rpm, tpm, concurrency, tokens, now, tpd, *others)

    def settle(self, tenant: str, request_id: str, *, refund_tokens: int, now: float | None = None) -> Command[None]:
        """At a request's end: give back its slot and the tokens not used, up to a full bucket. Once per request.

        Below 0 it takes what was used beyond the charge; the bucket then fills from less than nothing.
        """
        return self._script("settle", _read_nothing, tenant, request_id, 0, refund_tokens, now)

    def cancel_charge(self, tenant: str, request_id: str, *, tokens: int, now: float | None = None) -> Command[None]:
        """Refused after all (the queue was full): give back the request, its tokens and its slot."""
        return self._script("settle", _read_nothing, tenant, request_id, 1, tokens, now)

    def usage(self, tenant: str, now: float | None = None) -> Command[TenantUsage]:
        """What is in use and left now."""
        return self._script("usage", _read_usage, tenant, now)

    def holds(self, tenant: str, request_id: str) -> Command[bool]:
        """Whether a request has its slot still: nobody has settled it."""
        return Command(("ZSCORE", f"{self.keys.tenant(tenant)}:running", request_id), lambda reply: reply is not None)

    def slots(self, tenant: str, before_s: float) -> Command[list[str]]:
        """Ids of requests that took their slot before a unix time, for reconciling with the queues."""
        args = ("ZRANGEBYSCORE", f"{self.keys.tenant(tenant)}:running", "-inf", repr(before_s))
        return Command(args, lambda reply: [id_.decode() for id_ in reply])

    def _script(self, name: str, read: Callable[[Any], T], tenant: str, *args: Any) -> Command[T]:
        words = [_word(arg) for arg in args]
        return Command((self.keys.tenant(tenant), *words), read, load_script(name), 1)


def _word(arg: Any) -> Any:
    if arg is None:
        return ""
    return repr(arg) if isinstance(arg, float) else arg


def _read_admission(reply: list[Any], rpm: int | None, tpm: int | None) -> Admission:
    reason, retry_after, requests_left, tokens_left, requests_full, tokens_full = reply
    return Admission(
        ok=not reason,
        reason=reason.decode(),
        retry_after_s=float(retry_after),
        remaining_requests=None if rpm is None else int(float(requests_left)),
        remaining_tokens=None if tpm is None else int(float(tokens_left)),
        limit_requests=rpm,
        limit_tokens=tpm,
        reset_requests_s=float(requests_full),
        reset_tokens_s=float(tokens_full),
    )


def _read_usage(reply: list[Any]) -> TenantUsage:
    running, requests, tokens = reply
    return TenantUsage(
        running=running,
        remaining_requests=int(float(requests)) if requests else None,
        remaining_tokens=int(float(tokens)) if tokens else None,
    )


def _read_nothing(reply: Any) -> None:
    return None
