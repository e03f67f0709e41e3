"""The reader's time zone: a script tells it in a cookie before the first page is drawn; unknown ones are UTC."""

from datetime import tzinfo
from urllib.parse import unquote
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from django.http import HttpRequest

COOKIE = "penstock_zone"
UTC = ZoneInfo("UTC")


def reader_zone(request: HttpRequest) -> tzinfo:
    """The zone in which pages show times and read them from forms."""
    name = unquote(request.COOKIES.get(COOKIE, ""))
    if not name or len(name) > 64:
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # the name comes from outside and may be anything
        return UTC
