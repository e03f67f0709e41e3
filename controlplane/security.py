"""The Content-Security-Policy header: everything comes from our own origin."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase

STRICT = (
    "default-src 'self'; img-src 'self' data:; style-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
"""Neither scripts nor styles stand inline: scripts set what charts need on the elements themselves."""

_STYLED = STRICT.replace("style-src 'self';", "style-src 'self' 'unsafe-inline';")

POLICIES = {
    "/admin/": f"script-src 'self' 'unsafe-eval'; {_STYLED}",
    "/api/docs": _STYLED,
}
"""By path. The admin's theme evaluates Alpine.js expressions and, like the API's page, sets styles in its markup; no
script stands inline in either."""


def security_policy(
    get_response: Callable[[HttpRequest], HttpResponseBase],
) -> Callable[[HttpRequest], HttpResponseBase]:
    """Middleware that adds the policy unless the view set its own."""

    def add_header(request: HttpRequest) -> HttpResponseBase:
        response = get_response(request)
        policy = next((POLICIES[path] for path in POLICIES if request.path.startswith(path)), STRICT)
        response.headers.setdefault("Content-Security-Policy", policy)
        return response

    return add_header
