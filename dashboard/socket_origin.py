"""Which pages may open a socket: those of our own origin, and of the origins that a proxy gives us."""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from django.http.request import validate_host

Application = Callable[..., Awaitable[Any]]


class OwnOriginValidator:
    """Refuses a handshake whose `Origin` is neither `Host` nor trusted: a browser sends our cookie along from any page.

    Scheme apart, since a proxy may speak TLS for us, host and port must be the same; a host that `ALLOWED_HOSTS` lacks
    is none of ours.
    """

    def __init__(self, application: Application, *, allowed_hosts: Sequence[str], trusted: Sequence[str]) -> None:
        self._application = application
        self._allowed_hosts = allowed_hosts
        self._trusted = {origin.lower() for origin in trusted}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> Any:
        headers = {name: value.decode("latin-1").lower() for name, value in scope.get("headers", [])}
        if self._is_ours(headers.get(b"origin", ""), headers.get(b"host", "")):
            return await self._application(scope, receive, send)
        return await send({"type": "websocket.close"})  # before it is accepted: the handshake is answered with 403

    def _is_ours(self, origin: str, host: str) -> bool:
        if origin in self._trusted:
            return True
        try:
            name = urlsplit(origin).hostname or ""
        except ValueError:
            return False
        return bool(host) and origin in (f"http://{host}", f"https://{host}") and self._may_be_asked_for(name)

    def _may_be_asked_for(self, name: str) -> bool:
        return validate_host(f"[{name}]" if ":" in name else name, self._allowed_hosts)
