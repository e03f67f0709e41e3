"""HTTP status and body of every error, in one place: OpenAI's error object with a machine-readable `code`."""

import math

import msgspec

from inference.gateway import errors as gateway
from scheduling.limits import Admission

Headers = list[tuple[bytes, bytes]]

STATUS: dict[type[gateway.GatewayError], int] = {
    gateway.InvalidRequest: 400,
    gateway.InvalidKey: 401,
    gateway.Forbidden: 403,
    gateway.NotFound: 404,
    gateway.IdempotencyKeyReused: 409,
    gateway.RateLimited: 429,
    gateway.Unavailable: 503,
    gateway.DeadlineExceeded: 504,
}
"""By kind; a subclass has its parent's."""

STATUS_BY_CODE = {
    "method_not_allowed": 405,
    "request_timeout": 408,
    "request_too_large": 413,
    "cancelled": 499,
    "client_closed_request": 499,
    "shed": 503,
    "deadline_exceeded": 504,
    "context_length_exceeded": 400,
    "invalid_value": 400,
    "upstream_refused": 400,
    "upstream_no_model": 502,
    "upstream_error": 502,
    "upstream_ended": 502,
    "upstream_interrupted": 502,
    "upstream_unavailable": 503,
    "upstream_timeout": 504,
}
"""Codes that have a status of their own, those that workers give included. 499: cancelled, and not to be sent again."""

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled_error",
    502: "upstream_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def status_of(error: gateway.GatewayError) -> int:
    """The HTTP status of an error."""
    if (status := STATUS_BY_CODE.get(error.code)) is not None:
        return status
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def error_body(error: gateway.GatewayError) -> bytes:
    """OpenAI's error object as JSON."""
    kind = TYPES.get(status_of(error), "server_error")
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    )


def error_headers(error: gateway.GatewayError) -> Headers:
    """Retry-After (whole seconds, and milliseconds as OpenAI's clients read them) and the rate limit's headers."""
    headers: Headers = []
    if isinstance(error, gateway.InvalidKey):
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after_s is not None:
        seconds = max(1, math.ceil(error.retry_after_s))
        milliseconds = max(1, math.ceil(error.retry_after_s * 1000))
        headers.append((b"retry-after", b"%d" % seconds))
        headers.append((b"retry-after-ms", b"%d" % milliseconds))
    if error.admission is not None:
        headers.extend(limit_headers(error.admission))
    return headers


def limit_headers(admission: Admission) -> Headers:
    """`x-ratelimit-*` of the limits that the tenant has."""
    headers: Headers = []
    for name, limit, remaining, reset_s in (
        (b"requests", admission.limit_requests, admission.remaining_requests, admission.reset_requests_s),
        (b"tokens", admission.limit_tokens, admission.remaining_tokens, admission.reset_tokens_s),
    ):
        if limit is not None:
            headers.append((b"x-ratelimit-limit-" + name, b"%d" % limit))
            headers.append((b"x-ratelimit-remaining-" + name, b"%d" % max(0, remaining or 0)))
            headers.append((b"x-ratelimit-reset-" + name, _duration(reset_s or 0.0)))
    return headers


def _duration(seconds: float) -> bytes:
    """As OpenAI writes it: `12ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return b"%dms" % math.ceil(seconds * 1000)
    if seconds < 60:
        return f"{seconds:.3g}s".encode()
    return b"%dm%ds" % divmod(math.ceil(seconds), 60)
