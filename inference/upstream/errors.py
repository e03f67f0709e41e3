"""What can go wrong with an upstream server, by what follows from it for the request and for the replica."""

import re

import msgspec

MAX_MESSAGE = 300
"""Characters of an upstream's message that a client is told."""
_CONTROL = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+")


class UpstreamError(Exception):
    """The upstream did not answer a request. The message is fit for clients."""

    code = "upstream_error"
    may_be_the_requests = True
    """Whether the request itself may be to blame, so that it is not tried for ever."""
    is_refusal = False
    """Whether another try makes no sense."""
    retry_after_s = 0.0
    """When the upstream asked to be tried again."""


class Refused(UpstreamError):
    """The upstream refused the request."""

    code = "upstream_refused"
    is_refusal = True

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code or type(self).code


class Unreachable(UpstreamError):
    """The upstream cannot be reached."""

    code = "upstream_unavailable"
    may_be_the_requests = False


class Misconfigured(Unreachable):
    """The upstream does not let this replica in; an operator has to mend that."""


class Busy(UpstreamError):
    """The upstream turns requests away."""

    code = "upstream_unavailable"
    may_be_the_requests = False

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Failed(UpstreamError):
    """The upstream failed on the request, or said what cannot be read."""


class Silent(UpstreamError):
    """The upstream accepted the request and went silent."""

    code = "upstream_timeout"


class BrokenOff(UpstreamError):
    """The upstream broke off within its answer."""

    code = "upstream_interrupted"


class TooLong(UpstreamError):
    """The upstream's answer has no end."""

    is_refusal = True


def read_message(body: bytes, *, secret: str = "") -> tuple[str, str]:
    """Message (cleaned, bounded, without the key) and code of an error's body as servers write it; empty if unknown."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", ""
    error = fields.get("error", fields) if isinstance(fields, dict) else {}
    if isinstance(error, str):
        return clean(error, secret=secret), ""
    if not isinstance(error, dict):
        return "", ""
    found = next((error[name] for name in ("message", "detail") if isinstance(error.get(name), str)), "")
    code = error.get("code")
    return clean(found, secret=secret), code if isinstance(code, str) else ""


def clean(text: str, *, secret: str = "") -> str:
    """One line of bounded length, without control characters and without the key."""
    if secret:
        text = text.replace(secret, "[key]")
    text = _CONTROL.sub(" ", text).strip()
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"
