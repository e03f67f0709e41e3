"""Who may call the native API: a tenant's key, a signed-in operator, or an operator's token."""

from collections.abc import Mapping
from typing import Any, cast

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest
from ninja.errors import HttpError
from ninja.security import APIKeyCookie, HttpBearer

from controlplane.api.caller import Caller, find_caller
from controlplane.tokens import KIND, find_token
from dashboard.access import CONTROL_REPLICA, SWITCH_POLICY, VIEW
from inference.gateway.errors import Forbidden, InvalidKey, Unavailable
from inference.gateway.gateway import Gateway
from scheduling.audit import by_token


def find_gateway(request: HttpRequest) -> Gateway:
    """The gateway of this web process. Raises Unavailable outside of one."""
    scope: Mapping[str, Any] = request.scope if isinstance(request, ASGIRequest) else {}
    gateway = scope.get("state", {}).get("gateway")
    if gateway is None:
        raise Unavailable("This process serves no requests.")
    return cast(Gateway, gateway)


class KeyAuth(HttpBearer):
    """A tenant's API key."""

    def authenticate(self, request: HttpRequest, token: str) -> Caller | None:
        """The key's caller; None for an operator's token. Raises InvalidKey or Forbidden."""
        if token.startswith(f"{KIND}-"):
            return None
        return find_caller(f"Bearer {token}", find_gateway(request).directory)


class ViewerAuth(APIKeyCookie):
    """A user who may see the dashboard: signed in, or by a token of theirs (`Authorization: Bearer pso-...`)."""

    param_name = settings.SESSION_COOKIE_NAME
    permission = VIEW

    def __call__(self, request: HttpRequest) -> Any:
        """The user. A token is no cookie that a browser sends by itself, so it needs no CSRF token."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.startswith(f"{KIND}-"):
            return super().__call__(request)
        found = find_token(token.strip())
        if found is None:
            raise InvalidKey("The token is unknown, has expired or was revoked.")
        by_token.set(found.prefix)
        return self._check(found.user)

    def authenticate(self, request: HttpRequest, key: str | None) -> AbstractUser | None:
        """The user, None where nobody is signed in. Raises Forbidden without the permission."""
        user = request.user
        return self._check(cast(AbstractUser, user)) if user.is_authenticated else None

    def _check(self, user: AbstractUser) -> AbstractUser:
        if not user.has_perm(self.permission):
            raise Forbidden(f"This needs the permission {self.permission}.")
        return user


class OperatorAuth(ViewerAuth):
    """A signed-in operator; as with every form, the CSRF token must come along."""

    permission = SWITCH_POLICY

    def __call__(self, request: HttpRequest) -> Any:
        """The user. Raises Forbidden for a tenant's key."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and not token.startswith(f"{KIND}-"):
            raise Forbidden(
                "A tenant's key may not do this; sign in, or use an operator's token.", code="operator_required"
            )
        return super().__call__(request)

    def _get_key(self, request: HttpRequest) -> str | None:
        try:
            return super()._get_key(request)
        except HttpError as error:
            raise Forbidden("The CSRF token is missing or wrong (header X-CSRFToken).", code="csrf_failed") from error


class SessionAuth(OperatorAuth):
    """A signed-in user, for what a token may not do: make others."""

    permission = VIEW

    def __call__(self, request: HttpRequest) -> Any:
        """The user. Raises Forbidden for a token."""
        if request.headers.get("Authorization", ""):
            raise Forbidden("This needs a session, not a token.")
        return super().__call__(request)


class ControlAuth(OperatorAuth):
    """A signed-in operator who may steer replicas."""

    permission = CONTROL_REPLICA
