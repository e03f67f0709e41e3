"""Who may call the native API: a tenant's key, or a signed-in operator."""

from collections.abc import Mapping
from typing import Any, cast

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest
from ninja.errors import HttpError
from ninja.security import APIKeyCookie, HttpBearer

from controlplane.api.caller import Caller, find_caller
from dashboard.access import CONTROL_REPLICA, SWITCH_POLICY, VIEW
from inference.gateway.errors import Forbidden, Unavailable
from inference.gateway.gateway import Gateway


def find_gateway(request: HttpRequest) -> Gateway:
    """The gateway of this web process. Raises Unavailable outside of one."""
    scope: Mapping[str, Any] = request.scope if isinstance(request, ASGIRequest) else {}
    gateway = scope.get("state", {}).get("gateway")
    if gateway is None:
        raise Unavailable("This process serves no requests.")
    return cast(Gateway, gateway)


class KeyAuth(HttpBearer):
    """A tenant's API key."""

    def authenticate(self, request: HttpRequest, token: str) -> Caller:
        """The key's caller. Raises InvalidKey or Forbidden."""
        return find_caller(f"Bearer {token}", find_gateway(request).directory)


class ViewerAuth(APIKeyCookie):
    """A signed-in user who may see the dashboard."""

    param_name = settings.SESSION_COOKIE_NAME
    permission = VIEW

    def authenticate(self, request: HttpRequest, key: str | None) -> AbstractUser | None:
        """The user, None where nobody is signed in. Raises Forbidden without the permission."""
        user = request.user
        if not user.is_authenticated:
            return None
        if not user.has_perm(self.permission):
            raise Forbidden(f"This needs the permission {self.permission}.")
        return cast(AbstractUser, user)


class OperatorAuth(ViewerAuth):
    """A signed-in operator; as with every form, the CSRF token must come along."""

    permission = SWITCH_POLICY

    def _get_key(self, request: HttpRequest) -> str | None:
        try:
            return super()._get_key(request)
        except HttpError as error:
            raise Forbidden("The CSRF token is missing or wrong (header X-CSRFToken).", code="csrf_failed") from error


class ControlAuth(OperatorAuth):
    """A signed-in operator who may steer replicas."""

    permission = CONTROL_REPLICA
