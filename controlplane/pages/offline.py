"""The page of offline work: batches of all tenants, how far they are, and their cancelling."""

from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse, JsonResponse

from controlplane.models import Batch
from controlplane.offline.batches import cancel_for_operator
from controlplane.offline.selectors import MAX_LISTED, find_work, list_work
from dashboard.access import CANCEL_REQUEST
from dashboard.filters import Filters
from dashboard.page import render_page, viewers_only
from dashboard.views.commands import operators_only, reason_of, refuse
from inference.gateway.errors import InvalidRequest
from scheduling.models import Tenant

STATUSES = tuple(Batch.Status.values)
MAX_TENANTS = 500


@viewers_only
def offline(request: HttpRequest) -> HttpResponse:
    """What goes on first; a script draws it anew every few seconds."""
    filters = Filters(request.GET)
    tenant, status = filters.text("tenant", 63), filters.choice("status", STATUSES)
    after = filters.text("after", 64)
    works = list_work(tenant=tenant, status=status, after=after)
    context = {
        "works": works,
        "newer": bool(after),
        "next": works[-1].batch.id if len(works) == MAX_LISTED else "",
        "tenant": tenant,
        "status": status,
        "statuses": STATUSES,
        "tenants": Tenant.objects.values_list("name", flat=True)[:MAX_TENANTS],
        "filtered": bool(tenant or status),
        "problems": filters.problems,
    }
    return render_page(request, "dashboard/offline.html", context, page="offline")


@operators_only(CANCEL_REQUEST)
def cancel(request: HttpRequest, *, batch_id: str) -> JsonResponse:
    """Stop a batch; what is done stays."""
    work = find_work(batch_id)
    if work is None:
        return refuse(404, f"There is no batch {batch_id[:64]}.")
    assert isinstance(request.user, User)
    try:
        cancel_for_operator(work.batch, actor=request.user, reason=reason_of(request))
    except InvalidRequest as error:
        return refuse(409, str(error))
    return JsonResponse({"message": f"{batch_id} is being cancelled; what is done stays."})
