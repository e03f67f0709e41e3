"""Status, body and headers of errors, and who is let in with which priority."""

import json
from pathlib import Path

import pytest

from controlplane.api.errors import STATUS_BY_CODE, error_body, error_headers, limit_headers, status_of
from inference.gateway import errors
from scheduling.limits import Admission

API = Path(__file__).parents[2] / "docs" / "api.md"


def admission(**changes: object) -> Admission:
    values: dict[str, object] = {
        "ok": True,
        "reason": "",
        "retry_after_s": 0.0,
        "remaining_requests": 9,
        "remaining_tokens": None,
        "limit_requests": 10,
        "limit_tokens": None,
        "reset_requests_s": 6.0,
        "reset_tokens_s": 0.0,
    }
    return Admission(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.InvalidRequest("x"), 400, "invalid_request_error"),
        (errors.ContextLengthExceeded("x"), 400, "invalid_request_error"),
        (errors.InvalidKey(), 401, "authentication_error"),
        (errors.Forbidden(), 403, "permission_error"),
        (errors.ModelNotFound(), 404, "invalid_request_error"),
        (errors.RateLimited("x", code="concurrency_exceeded"), 429, "rate_limit_error"),
        (errors.QueueFull(), 503, "service_unavailable_error"),
        (errors.RedisUnavailable(), 503, "service_unavailable_error"),
        (errors.RequestEnded("x", code="cancelled"), 499, "cancelled_error"),
        (errors.RequestEnded(), 500, "server_error"),
        (errors.InvalidRequest("x", code="request_too_large"), 413, "invalid_request_error"),
    ],
)
def test_every_kind_has_its_status_and_type(error: errors.GatewayError, status: int, kind: str) -> None:
    assert status_of(error) == status
    body = json.loads(error_body(error))["error"]
    assert body["type"] == kind
    assert body["code"]
    assert body["message"]


def test_every_code_with_a_status_of_its_own_is_documented_beside_it() -> None:
    rows = [line for line in API.read_text().splitlines() if line.startswith("| ")]
    for code, status in STATUS_BY_CODE.items():
        if code != "client_closed_request":  # nobody is there to read it
            assert any(str(status) in row.split("|")[1] and f"`{code}`" in row for row in rows), code


def test_retry_after_is_in_whole_seconds_rounded_up() -> None:
    headers = dict(error_headers(errors.RateLimited("x", retry_after_s=1.2)))
    assert headers == {b"retry-after": b"2", b"retry-after-ms": b"1200"}
    assert dict(error_headers(errors.QueueFull(retry_after_s=0.0)))[b"retry-after"] == b"1"
    assert error_headers(errors.InvalidRequest("x")) == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, b"0ms"), (0.012, b"12ms"), (6.0, b"6s"), (60, b"1m0s"), (359.5, b"6m0s")]
)
def test_resets_are_written_as_openai_writes_them(seconds: float, text: bytes) -> None:
    headers = dict(limit_headers(admission(reset_requests_s=seconds)))
    assert headers[b"x-ratelimit-reset-requests"] == text


def test_only_limits_that_a_tenant_has_are_told() -> None:
    assert {name for name, _ in limit_headers(admission())} == {
        b"x-ratelimit-limit-requests",
        b"x-ratelimit-remaining-requests",
        b"x-ratelimit-reset-requests",
    }
    assert limit_headers(admission(limit_requests=None)) == []
