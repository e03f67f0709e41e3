"""Tells the audit trail from where a change was asked."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase

from scheduling.audit import by_token, origin


def remember_origin(
    get_response: Callable[[HttpRequest], HttpResponseBase],
) -> Callable[[HttpRequest], HttpResponseBase]:
    """Middleware: while a request is served, `scheduling.audit.origin` holds its address, and `by_token` its token.

    That of the connection: the web server puts there what a proxy on its own machine says, and believes no other.
    """

    def remember(request: HttpRequest) -> HttpResponseBase:
        address = origin.set(str(request.META.get("REMOTE_ADDR") or "")[:64])
        token = by_token.set("")  # the API sets it where one comes along
        try:
            return get_response(request)
        finally:
            origin.reset(address)
            by_token.reset(token)

    return remember
