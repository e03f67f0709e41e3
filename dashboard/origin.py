"""Tells the audit trail from where a change was asked."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase

from scheduling.audit import origin


def remember_origin(
    get_response: Callable[[HttpRequest], HttpResponseBase],
) -> Callable[[HttpRequest], HttpResponseBase]:
    """Middleware: while a request is served, `scheduling.audit.origin` holds its address.

    That of the connection: the web server puts there what a proxy on its own machine says, and believes no other.
    """

    def remember(request: HttpRequest) -> HttpResponseBase:
        token = origin.set(str(request.META.get("REMOTE_ADDR") or "")[:64])
        try:
            return get_response(request)
        finally:
            origin.reset(token)

    return remember
