"""Signing in, and the bound on guessing: attempts are counted in Redis, per account and per address."""

import hashlib
import ipaddress
import logging
import math
from dataclasses import dataclass
from typing import Any

import redis
from django import forms
from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.views import LoginView
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse
from redis.exceptions import RedisError

from scheduling.connection import live_keys, live_redis
from scheduling.keys import Keys

log = logging.getLogger(__name__)

WINDOW_S = 15 * 60
PER_ACCOUNT_AND_ADDRESS = 5
PER_ACCOUNT = 100
"""From all addresses together; high, so that it takes strangers at many addresses to lock somebody out."""
PER_ADDRESS = 50
"""For all accounts together."""


@dataclass(frozen=True, slots=True)
class _Count:
    key: str
    limit: int


class SignInLimit:
    """Attempts within a window that begins with the first. A success forgives those of its account and address."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    def begin(self, account: str, address: str) -> float:
        """Count an attempt: 0 where it may go on, otherwise seconds until the next may be made.

        It is counted before the password is looked at, so that attempts at the same time are bounded too. An attempt
        that its address was refused is not counted for the account: one address cannot use up what all have together.
        Without Redis nothing is counted: an operator must get in when things fail.
        """
        both, everywhere, there = self._counts(account, address)
        try:
            return self._count(both, there) or self._count(everywhere)
        except (RedisError, OSError) as error:
            log.warning("Attempts to sign in are not counted: %s", error)
            return 0.0

    def _count(self, *counts: _Count) -> float:
        with self._client.pipeline(transaction=True) as pipe:
            for count in counts:
                pipe.set(count.key, 0, ex=WINDOW_S, nx=True)
                pipe.incr(count.key)
                pipe.ttl(count.key)
            answers = pipe.execute()
        used, left_s = answers[1::3], answers[2::3]
        return float(max((s for count, n, s in zip(counts, used, left_s, strict=True) if n > count.limit), default=0))

    def succeed(self, account: str, address: str) -> None:
        """The attempt that was begun last had the right password."""
        both, *others = self._counts(account, address)
        try:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.delete(both.key)
                for count in others:
                    pipe.decr(count.key)
                    pipe.expire(count.key, WINDOW_S)
                pipe.execute()
        except (RedisError, OSError):
            return

    def _counts(self, account: str, address: str) -> list[_Count]:
        account, network = account.strip().lower(), _network(address)
        return [
            _Count(self._key("both", account, network), PER_ACCOUNT_AND_ADDRESS),
            _Count(self._key("account", account), PER_ACCOUNT),
            _Count(self._key("address", network), PER_ADDRESS),
        ]

    def _key(self, kind: str, *names: str) -> str:
        """A digest, since names come from strangers and may be of any length."""
        return self._keys.sign_in(kind, hashlib.sha256("\0".join(names).encode()).hexdigest()[:32])


def _network(address: str) -> str:
    """An IPv4 address, or the /64 of an IPv6 one, which belongs to one customer."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:  # all of IPv4 lies in one /64
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class SignInForm(AuthenticationForm):
    """Django's form, behind the limit."""

    def __init__(self, request: HttpRequest | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(request, *args, **kwargs)
        self.retry_after_s = 0.0

    def clean(self) -> dict[str, Any]:
        """Raises ValidationError; where there were too many attempts, it says when the next may be made."""
        account = self.cleaned_data.get("username")
        if not account or not self.cleaned_data.get("password"):
            return self.cleaned_data
        limit = SignInLimit(live_redis(), live_keys())
        address = self.request.META.get("REMOTE_ADDR", "") if self.request is not None else ""
        self.retry_after_s = limit.begin(account, address)
        if self.retry_after_s:
            log.warning("Too many attempts to sign in as %.40r from %s", account, address)
            raise ValidationError(_try_again(self.retry_after_s), code="too_many_attempts")
        cleaned = super().clean()
        limit.succeed(account, address)
        return cleaned


class SignInView(LoginView):
    """The one way in, also to the admin."""

    template_name = "dashboard/login.html"
    redirect_authenticated_user = True
    authentication_form = SignInForm

    def form_invalid(self, form: forms.Form) -> HttpResponse:
        """429 where the limit is reached, otherwise the page again."""
        response = super().form_invalid(form)  # type: ignore[arg-type]
        if retry_after_s := getattr(form, "retry_after_s", 0.0):
            response.status_code = 429
            response.headers["Retry-After"] = str(math.ceil(retry_after_s))
        return response


def _try_again(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"Too many attempts. Try again in {minutes} minute{'' if minutes == 1 else 's'}."
