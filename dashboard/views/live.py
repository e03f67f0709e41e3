"""The live page, and whether a session still holds."""

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from dashboard.access import VIEW
from dashboard.page import render_page, viewers_only
from scheduling.core.policies import POLICIES


@viewers_only
def live(request: HttpRequest) -> HttpResponse:
    """The page; its figures come by the socket."""
    return render_page(request, "dashboard/live.html", {"policies": POLICIES.values()}, page="dashboard")


@never_cache
@require_GET
def session(request: HttpRequest) -> JsonResponse:
    """Whether the session still holds: a page whose socket is refused asks here whether to sign in again."""
    return JsonResponse({"signed_in": request.user.is_authenticated, "may_view": request.user.has_perm(VIEW)})
