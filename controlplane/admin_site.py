"""The admin's site: open to administrators, behind the dashboard's own sign-in."""
# mypy: disable-error-code="misc"
# (the theme comes without types)

from typing import Any

from django.contrib.auth.models import User
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from unfold.sites import UnfoldAdminSite

from dashboard.access import USE_ADMIN
from scheduling.audit import record_action


def record_password(actor: User, user: User, reason: str = "") -> None:
    """Write down that an account has another password, or none any more; never which."""
    after = {"password": "changed" if user.has_usable_password() else "none"}
    record_action(actor=actor, action="user.password", target=user.get_username(), after=after, reason=reason)


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

    @transaction.atomic
    def password_change(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """One's own, written into the audit trail."""
        user = User.objects.get(pk=request.user.pk)
        response: HttpResponse = super().password_change(request, extra_context)
        now = User.objects.get(pk=user.pk)
        if now.password != user.password:
            record_password(user, now, "one's own")
        return response
