"""The page of the fleet: every worker, what its device says, and how it is steered."""

from django.http import HttpRequest, HttpResponse

from dashboard.page import render_page, viewers_only
from dashboard.replica_form import LARGEST_BATCH, MODES
from scheduling.core.sizing.strategies import SIZINGS


@viewers_only
def fleet(request: HttpRequest) -> HttpResponse:
    """The frame and the forms; workers come by the feed."""
    sizings = [
        {"kind": kind, "fields": [(name, spec, spec.default) for name, spec in kind.parameters.items()]}
        for kind in SIZINGS.values()
    ]
    context = {"modes": MODES, "sizings": sizings, "largest_batch": LARGEST_BATCH}
    return render_page(request, "dashboard/fleet.html", context, page="fleet")
