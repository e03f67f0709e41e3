"""The admin's site: open to administrators, behind the dashboard's own sign-in."""
# mypy: disable-error-code="misc"
# (the theme comes without types)

from typing import Any

from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from unfold.sites import UnfoldAdminSite

USE_ADMIN = "controlplane.use_admin"


class PenstockAdminSite(UnfoldAdminSite):
    """Lets in who has the permission or staff status; each page asks for its own permission beside that."""

    def has_permission(self, request: HttpRequest) -> bool:
        user = request.user
        return user.is_active and (getattr(user, "is_staff", False) or user.has_perm(USE_ADMIN))

    def login(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """There is one page for signing in, with one limit on attempts."""
        if self.has_permission(request):
            return redirect("admin:index")
        if request.user.is_authenticated:
            raise PermissionDenied
        return redirect_to_login(request.GET.get("next") or "/admin/")
