"""Before a switch and after it: replays of recorded traffic under other policies, and switches under a guard."""

from datetime import datetime
from typing import Annotated, Any

from django.contrib.auth.models import User
from django.http import HttpRequest
from kombu.exceptions import OperationalError
from ninja import Field, Query, Router, Schema
from redis.exceptions import RedisError

from controlplane.api.access import OperatorAuth, ViewerAuth
from controlplane.api.queries import aware, without_nul
from controlplane.api.schemas import STORABLE
from dashboard.guard import METRICS, Guard, GuardError, switch_under_guard
from dashboard.models import GuardedSwitch, WhatIfRun
from dashboard.page import list_models
from dashboard.selectors.keyset import MAX_ROWS
from dashboard.tasks import run_what_if
from dashboard.what_if import MAX_CANDIDATES, WhatIfError, ask_what_if
from inference.control import send_control
from inference.gateway.errors import InvalidRequest, NotFound, RedisUnavailable
from inference.services import announce_policy
from scheduling.models import PolicyRevision

router = Router(tags=["operator"], auth=ViewerAuth())


class ListQuery(Schema, extra="forbid"):
    """Which rows of a model's."""

    model: str = Field(max_length=128)
    before: int | None = Field(default=None, ge=1, le=2**31 - 1, description="Those before this one.")
    limit: int = Field(default=50, ge=1, le=MAX_ROWS)


class CandidateBody(Schema, extra="forbid"):
    """A policy to try."""

    policy: str = Field(max_length=64)
    params: dict[str, float | str] = Field(default={}, description="Those that differ from the defaults.")


class WhatIfBody(Schema, extra="forbid"):
    """Which traffic, under which policies."""

    model: str = Field(max_length=128)
    start: datetime
    end: datetime
    candidates: list[CandidateBody] = Field(min_length=1, max_length=MAX_CANDIDATES)


class WhatIfView(Schema):
    """A replay: asked for, under way, or with its result (see docs/simulator.md)."""

    id: int
    model: str
    start: datetime
    end: datetime
    candidates: list[dict[str, Any]]
    by: str
    state: str = Field(description="queued, running, done or failed")
    progress: float = Field(description="0 to 1.")
    error: str
    created_at: datetime
    finished_at: datetime | None
    result: dict[str, Any] | None = None


class GuardBody(Schema, extra="forbid"):
    """When to turn back."""

    metric: str = Field(max_length=32, description=f"One of {', '.join(METRICS)}.")
    threshold: float = Field(ge=0, le=1e6)
    watch_s: int = Field(ge=5, le=86_400)


class GuardedBody(Schema, extra="forbid"):
    """A switch under a guard."""

    model: str = Field(max_length=128)
    name: str = Field(max_length=64)
    params: dict[str, float | str] = {}
    reason: str = Field(min_length=1, max_length=500, pattern=STORABLE)
    guard: GuardBody


class GuardView(Schema):
    """A watch over a revision, with the figures of before and after."""

    model: str
    revision: int
    metric: str
    threshold: float
    watch_s: int
    state: str = Field(description="watching, kept, rolled back or superseded")
    started_at: datetime
    ends_at: datetime
    before: dict[str, Any]
    after: dict[str, Any]
    verdict: str
    rolled_back_to: int | None


@router.post("/operator/what-if", response={202: WhatIfView}, auth=OperatorAuth(), summary="Replay recorded traffic")
def ask(request: HttpRequest, body: WhatIfBody) -> tuple[int, WhatIfView]:
    """For operators. Answers at once; poll `/operator/what-if/{id}`. One replay at a time."""
    start, end = aware(body.start, "start"), aware(body.end, "end")
    assert start is not None
    assert end is not None
    _known(body.model)
    candidates = [{"policy": one.policy, "params": one.params} for one in body.candidates]
    try:
        run = ask_what_if(model=body.model, start=start, end=end, candidates=candidates, actor=_user(request))
    except WhatIfError as error:
        raise InvalidRequest(str(error)) from error
    try:
        run_what_if.delay(run.pk)
    except (OperationalError, RedisError, OSError) as error:
        run.delete()
        raise RedisUnavailable("The ops worker cannot be told: Redis does not answer.") from error
    return 202, _run(run)


@router.get("/operator/what-if", response=list[WhatIfView], summary="Replays, latest first, without their results")
def list_runs(request: HttpRequest, query: Annotated[ListQuery, Query()]) -> list[WhatIfView]:
    """For signed-in viewers. Read on with the `id` of the last one as `before`."""
    rows = WhatIfRun.objects.filter(model=without_nul(query.model)).defer("result")
    if query.before is not None:
        rows = rows.filter(id__lt=query.before)
    return [_run(row) for row in rows.order_by("-id")[: query.limit]]


@router.get("/operator/what-if/{int:run_id}", response=WhatIfView, summary="One replay with its result")
def read_run(request: HttpRequest, run_id: int) -> WhatIfView:
    """For signed-in viewers."""
    row = WhatIfRun.objects.filter(pk=run_id).first() if run_id < 2**63 else None
    if row is None:
        raise NotFound("There is no such replay.", code="what_if_not_found")
    return _run(row, result=row.result)


@router.post("/operator/guarded-switch", response=GuardView, auth=OperatorAuth(), summary="Switch under a guard")
def switch_guarded(request: HttpRequest, body: GuardedBody) -> GuardView:
    """For operators. Where the figure gets worse than the threshold in the watch time, the former policy comes back."""
    try:
        guard = Guard(metric=body.guard.metric, threshold=body.guard.threshold, watch_s=body.guard.watch_s)
    except GuardError as error:
        raise InvalidRequest(str(error), param="guard") from error
    _known(body.model)
    _, watched = switch_under_guard(
        guard,
        model=body.model,
        name=body.name,
        params=body.params,
        actor=_user(request),
        reason=body.reason,
        announce=_announce,
    )
    return _guard(watched)


@router.get("/operator/guards", response=list[GuardView], summary="Watches over revisions, latest first")
def list_guards(request: HttpRequest, query: Annotated[ListQuery, Query()]) -> list[GuardView]:
    """For signed-in viewers. Read on with the `revision` of the last one as `before`."""
    rows = GuardedSwitch.objects.filter(model=without_nul(query.model))
    if query.before is not None:
        rows = rows.filter(revision__lt=query.before)
    return [_guard(row) for row in rows.order_by("-revision")[: query.limit]]


def _announce(revision: PolicyRevision) -> dict[str, Any]:
    return announce_policy(revision, send_control)


def _known(model: str) -> None:
    if model not in list_models():
        raise NotFound(f"There is no model {model[:100]!r}.", code="model_not_found")


def _user(request: HttpRequest) -> User:
    user = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    return user


def _run(row: WhatIfRun, result: dict[str, Any] | None = None) -> WhatIfView:
    names = [name for name in WhatIfView.model_fields if name not in ("by", "result")]
    return WhatIfView(by=row.actor_name, result=result, **{name: getattr(row, name) for name in names})


def _guard(row: GuardedSwitch) -> GuardView:
    return GuardView(**{name: getattr(row, name) for name in GuardView.model_fields})
