"""Requests of all tenants, for those who watch: what was recorded, what runs and waits, one's life, and its end."""

import time
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Literal

from django.contrib.auth.models import User
from django.http import HttpRequest
from ninja import Field, Query, Router, Schema
from redis.exceptions import RedisError

from controlplane.api.access import ControlAuth, ViewerAuth
from controlplane.api.queries import aware, read_cursor, without_nul
from controlplane.api.schemas import STORABLE
from dashboard.cancelling import cancel_request
from dashboard.page import list_models
from dashboard.selectors.keyset import MAX_ROWS
from dashboard.selectors.life import find_life
from dashboard.selectors.requests import RequestFilter, search_requests
from dashboard.selectors.waiting import list_live
from inference.gateway.errors import NotFound, RedisUnavailable

router = Router(tags=["operator"], auth=ViewerAuth())
AWAY = (RedisError, OSError)


class RecordedRequest(Schema):
    """A request that ended."""

    request_id: str
    model: str
    tenant: str
    priority: int
    endpoint: str
    state: str
    finish_reason: str
    error_code: str
    arrived_at: datetime
    claimed_at: datetime | None
    first_token_at: datetime | None
    finished_at: datetime
    deadline_at: datetime | None
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int
    attempts: int
    replica: str
    policy: str
    policy_revision: int
    user: str
    ttft_s: float | None
    e2e_s: float


class RecordedRequests(Schema):
    """Latest end first."""

    requests: list[RecordedRequest]
    next_after: str | None = Field(description="Give it as `after` to read on; null at the end.")


class SearchQuery(Schema, extra="forbid"):
    """Which requests. Times bound the end."""

    id: str = Field(default="", max_length=64, description="The beginning of an id.")
    model: str = Field(default="", max_length=128)
    tenant: str = Field(default="", max_length=63)
    priority: int | None = Field(default=None, ge=0, le=5)
    state: Literal["", "finished", "failed", "cancelled"] = ""
    since: datetime | None = None
    until: datetime | None = None
    after: str = Field(default="", max_length=40)
    limit: int = Field(default=50, ge=1, le=MAX_ROWS)


class LiveRow(Schema):
    """A request that runs (on `replica`) or waits."""

    id: str
    tenant: str
    priority: int
    state: str
    prompt_tokens: int
    max_tokens: int
    output_tokens: int
    arrival_s: float | None
    replica: str


class LiveRows(Schema):
    """What has not ended. Of many that wait, some are drawn at random."""

    time_s: float
    running: list[LiveRow]
    waiting: list[LiveRow]
    num_waiting: int


class LifeEvent(Schema):
    """A moment of a request's life."""

    kind: str
    title: str
    when: datetime | None
    after_s: float | None = Field(description="Seconds from the arrival.")
    details: list[str]


class LifeView(Schema):
    """A request from its arrival to its end, or to now."""

    id: str
    model: str
    tenant: str
    priority: int
    endpoint: str
    state: str
    prompt_tokens: int
    completion_tokens: int
    max_tokens: int
    attempts: int
    replica: str
    user: str
    error_code: str
    ended: bool
    events: list[LifeEvent]
    phases: list[tuple[str, float]] = Field(
        description="(queued, ready, prefill, decode or preempted, seconds), in order, as far as it came."
    )
    tokens: list[tuple[float, int]] = Field(description="(seconds after the arrival, output tokens) of even spans.")


class CancelBody(Schema, extra="forbid"):
    """Why a request is cancelled."""

    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE)


class Cancelled(Schema):
    """Where the request was."""

    id: str
    was: str = Field(
        description="queued: it is over; running: its worker ends it at the next step; cancelling: so it was already"
    )


@router.get("/operator/requests", response=RecordedRequests, summary="Search recorded requests")
def search(request: HttpRequest, query: Annotated[SearchQuery, Query()]) -> RecordedRequests:
    """For signed-in viewers."""
    after = read_cursor(query.after)
    wanted = RequestFilter(
        request_id=without_nul(query.id),
        model=without_nul(query.model),
        tenant=without_nul(query.tenant),
        priority=query.priority,
        state=query.state,
        since=aware(query.since, "since"),
        until=aware(query.until, "until"),
    )
    page = search_requests(wanted, after=after, limit=query.limit)
    rows = [RecordedRequest(**{name: getattr(row, name) for name in RecordedRequest.model_fields}) for row in page.rows]
    return RecordedRequests(requests=rows, next_after=str(page.next) if page.next else None)


@router.get("/operator/requests/live", response=LiveRows, summary="What runs and what waits")
def live(request: HttpRequest, model: Annotated[str, Query(max_length=128)]) -> LiveRows:
    """For signed-in viewers."""
    if model not in list_models():
        raise NotFound(f"There is no model {model[:100]!r}.", code="model_not_found")
    try:
        found = list_live(model)
    except AWAY as error:
        raise RedisUnavailable("Redis does not answer.") from error
    return LiveRows(
        time_s=time.time(),
        running=[LiveRow(**asdict(row)) for row in found.running],
        waiting=[LiveRow(**asdict(row)) for row in found.waiting],
        num_waiting=found.num_waiting,
    )


@router.get("/operator/requests/{request_id}", response=LifeView, summary="One request's life")
def life(request: HttpRequest, request_id: str) -> LifeView:
    """For signed-in viewers. Waiting: behind how many, by which rank, and what is lacking."""
    try:
        found = find_life(request_id, list_models())
    except AWAY as error:
        raise RedisUnavailable("The history has no such request, and Redis does not answer.") from error
    if found is None:
        raise NotFound("There is no such request.", code="request_not_found")
    bursts = found.course.bursts if found.course else ()
    return LifeView(**asdict(found), tokens=[(ms / 1000, num) for ms, num in bursts])


@router.post(
    "/operator/requests/{request_id}/cancel", response=Cancelled, auth=ControlAuth(), summary="Cancel a request"
)
def cancel(request: HttpRequest, request_id: str, body: CancelBody) -> Cancelled:
    """For operators, by session and CSRF token. Recorded with the reason."""
    user = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    try:
        was = cancel_request(request_id=request_id, models=list_models(), actor=user, reason=body.reason)
    except AWAY as error:
        raise RedisUnavailable("Redis does not answer, so the request could not be cancelled.") from error
    if was == "gone":
        raise NotFound("It neither waits nor runs; it may have ended.", code="request_not_found")
    return Cancelled(id=request_id, was=was)
