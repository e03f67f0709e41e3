"""What each tenant used and got, for those who watch over them."""

from dataclasses import asdict
from typing import Annotated

from django.http import HttpRequest
from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.api.access import ViewerAuth
from controlplane.api.queries import without_nul
from dashboard.page import list_models
from dashboard.selectors.tenants import MAX_TENANTS, Attainment, TenantRow, read_tenants

router = Router(tags=["operator"], auth=ViewerAuth())


class UseView(Schema):
    """What a tenant uses now; null where there is no such limit."""

    running: int
    waiting: int
    slots: int = Field(description="Concurrency slots taken.")
    concurrency: int | None
    rpm: int | None
    rpm_used: int | None
    tpm: int | None
    tpm_used: int | None
    tpd: int | None
    tpd_used: int | None = Field(description="Without a daily budget: tokens of requests that ended today (UTC).")


class AttainmentView(Schema):
    """Requests that a service level judged: ended, refused for want of capacity, or past their target now."""

    judged: int
    met: int
    share: float | None
    budget_left: float | None = Field(description="Of the misses that the objective allows; below 0: overdrawn.")


class ServiceView(Schema):
    """The last hour, among tenants who asked. Shares are of 1."""

    tokens: int
    asked: int = Field(
        description="Tokens received, and a usual number for each request that waits or was refused for capacity."
    )
    requests: int = Field(description="Answered.")
    failed: int = Field(description="Ended without an answer. What was refused at once is in `refused`.")
    share: float | None = Field(description="Of all tokens.")
    entitled: float | None = Field(description="By weight, and no more than was asked.")


class TenantView(Schema):
    """One tenant."""

    name: str
    display_name: str
    weight: float
    suspended: bool
    use: UseView | None = Field(description="Null while the queue's store does not answer.")
    attainment: dict[str, AttainmentView] = Field(description="By window: 1h, 24h, 30d.")
    service: ServiceView
    refusals: dict[str, int] = Field(description="By reason, since the counters began.")
    refused: dict[str, dict[str, int]] = Field(description="By window (1h, 24h, 30d), then by reason.")


class TenantsAnswer(Schema):
    """Tenants, by name."""

    tenants: list[TenantView]
    next_after: str | None = Field(description="Give it as `after` to read on; null at the end.")
    jain: float | None = Field(
        description="Jain's index of share per entitlement over the last hour, of all tenants; 1 is even."
    )


class TenantsQuery(Schema, extra="forbid"):
    """Which tenants."""

    after: str = Field(default="", max_length=63, description="The `name` of the last one that was read.")
    limit: int = Field(default=MAX_TENANTS, ge=1, le=MAX_TENANTS)


@router.get("/operator/tenants", response=TenantsAnswer, summary="What tenants use and got")
def list_tenants(request: HttpRequest, query: Annotated[TenantsQuery, Query()]) -> TenantsAnswer:
    """For signed-in viewers. Shares are among all tenants, also where some are listed."""
    view = read_tenants(list_models(), timezone.now(), after=without_nul(query.after), limit=query.limit)
    return TenantsAnswer(tenants=[_tenant(row) for row in view.rows], next_after=view.next or None, jain=view.jain)


def _tenant(row: TenantRow) -> TenantView:
    values = asdict(row) | {"attainment": {name: _attainment(at) for name, at in row.attainment.items()}}
    return TenantView(**values)


def _attainment(at: Attainment) -> AttainmentView:
    return AttainmentView(judged=at.judged, met=at.met, share=at.share, budget_left=at.budget_left)
