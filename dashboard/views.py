"""The live page and what its buttons ask for."""

from django.contrib.auth.decorators import login_required, permission_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

VIEW_PERMISSION = "scheduling.view_policyrevision"


@login_required
@permission_required(VIEW_PERMISSION, raise_exception=True)
def live(request: HttpRequest) -> HttpResponse:
    """The page; its figures come by the socket."""
    return render(request, "dashboard/live.html")
