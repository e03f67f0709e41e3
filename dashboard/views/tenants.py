"""The page of tenants: what each uses, whether its SLA was met, and how fair the fleet was."""

from django.http import HttpRequest, HttpResponse
from django.utils import timezone

from dashboard.filters import Filters
from dashboard.page import list_models, render_page, viewers_only
from dashboard.selectors.tenants import WINDOWS, read_tenants


@viewers_only
def tenants(request: HttpRequest) -> HttpResponse:
    """Figures as of now; a script draws them anew every few seconds."""
    after = Filters(request.GET).text("after", 63)
    context = {
        "view": read_tenants(list_models(), timezone.now(), after=after),
        "after": after,
        "windows": list(WINDOWS),
        "sla_columns": [title for window in WINDOWS for title in (f"#within, {window}", "#budget")],
        "refused_columns": [f"last {window}" for window in WINDOWS],
    }
    return render_page(request, "dashboard/tenants.html", context, page="tenants")
