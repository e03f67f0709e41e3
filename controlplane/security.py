"""The Content-Security-Policy header: everything comes from our own origin."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase

STRICT = (
    "default-src 'self'; img-src 'self' data:; style-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
"""Neither scripts nor styles stand inline: scripts set what charts need on the elements themselves."""

LENIENT = STRICT.replace("style-src 'self';", "style-src 'self' 'unsafe-inline';").replace(
    "default-src 'self';", "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
)
"""For the admin, whose theme uses Alpine.js expressions, and for the API's page, which has an inline script."""

LENIENT_PATHS = ("/admin/", "/api/docs")


def security_policy(
    get_response: Callable[[HttpRequest], HttpResponseBase],
) -> Callable[[HttpRequest], HttpResponseBase]:
    """Middleware that adds the policy unless the view set its own."""

    def add_header(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        policy = LENIENT if request.path.startswith(LENIENT_PATHS) else STRICT
        response.headers.setdefault("Content-Security-Policy", policy)
        return response

    return add_header
