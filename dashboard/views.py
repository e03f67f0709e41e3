"""The live page and what its buttons ask for."""

from django.contrib.auth.decorators import login_required, permission_required
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render

from dashboard.access import SWITCH_POLICY, VIEW


@login_required
@permission_required(VIEW, raise_exception=True)
def live(request: HttpRequest) -> HttpResponse:
    """The page; its figures come by the socket."""
    return render(request, "dashboard/live.html")


def session(request: HttpRequest) -> JsonResponse:
    """Whether the session still holds: a page whose socket is refused asks here whether to sign in again."""
    return JsonResponse({"signed_in": request.user.is_authenticated, "may_view": request.user.has_perm(VIEW)})


def switch(request: HttpRequest, model: str) -> JsonResponse:
    """Switch a queue's policy."""
    return JsonResponse({}, status=403 if not request.user.has_perm(SWITCH_POLICY) else 400)


def control(request: HttpRequest, replica: str, command: str) -> JsonResponse:
    """Pause, resume or drain a worker."""
    return JsonResponse({}, status=400)
