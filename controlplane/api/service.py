"""How the requests of the last minute were served, by tenant and priority: the live page's table."""

from typing import Annotated, Any

from django.http import HttpRequest
from ninja import Field, Query, Router, Schema

from controlplane.api.access import ViewerAuth
from controlplane.api.queries import without_nul
from dashboard.selectors.service import ServiceWatch

router = Router(tags=["operator"], auth=ViewerAuth())


class PercentilesView(Schema):
    """Of the requests that were answered; null where none was. The target is null where there is no service level."""

    p50_s: float | None = None
    p99_s: float | None = None
    target_s: float | None = None


class ServedView(Schema):
    """The requests of a tenant and priority that ended in the last minute."""

    model: str
    tenant: str
    priority: int
    num: int
    ttft: PercentilesView = Field(description="Time to the first token.")
    tpot: PercentilesView = Field(description="Time per output token after it.")
    met: float | None = Field(default=None, description="Share within all targets; null where none was judged.")
    objective: float | None = Field(default=None, description="Share that should be.")


@router.get("/operator/service", response=list[ServedView], summary="TTFT and TPOT of the last minute, with targets")
def read_service(request: HttpRequest, model: Annotated[str, Query(max_length=128)] = "") -> list[dict[str, Any]]:
    """For signed-in viewers. The busiest 24 pairs of each model, of at most 5,000 requests."""
    wanted = without_nul(model)
    return [
        {"model": name, **figures}
        for name, pairs in sorted(ServiceWatch().read().items())
        if wanted in ("", name)
        for figures in pairs.values()
    ]
