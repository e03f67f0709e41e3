"""Where a webhook may point: http or https, and addresses that are public or that the settings name.

An administrator gives the URL, and the ops worker calls it from inside the installation's network: without this check
it would be a way to services that trust whoever is inside (server-side request forgery), such as a cloud's metadata.
"""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}
MAX_ADDRESSES = 4
TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
"""NAT64, well-known (RFC 6052) and local (RFC 8215): older versions of Python take the second for global."""


class AddressError(ValueError):
    """The address cannot be used; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A webhook's URL, taken apart. `path` has its query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def check_url(url: str) -> Target:
    """The URL of a webhook. Raises AddressError; the host is not looked up."""
    if not url.isascii() or any(char <= " " or char == "\x7f" for char in url):
        raise AddressError("Give a URL of ASCII characters without spaces, such as https://hooks.example.org/penstock.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise AddressError("The URL is malformed; give one such as https://hooks.example.org/penstock.") from error
    if parts.scheme not in PORTS or not host:
        raise AddressError("Give a URL that begins with https:// or http:// and names a host.")
    if parts.username is not None or parts.password is not None:
        raise AddressError("A URL with a user name or password is not used; receivers check the signature instead.")
    path = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    return Target(scheme=parts.scheme, host=host, port=port or PORTS[parts.scheme], path=path)


def find_addresses(target: Target, allowed: Sequence[Network]) -> list[Address]:
    """The addresses to connect to, in order. Raises AddressError where one of them may not be used.

    The caller connects to these very addresses: a name that is looked up twice may answer differently (DNS rebinding).
    """
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"The host {target.host} is not known.") from error
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    for address in addresses:
        if not may_connect(address, allowed):
            raise AddressError(
                f"{target.host} is {address}, no public address. Name its network in PENSTOCK_WEBHOOK_NETWORKS."
            )
    return addresses[:MAX_ADDRESSES]


def may_connect(address: Address, allowed: Sequence[Network]) -> bool:
    """Whether an address is public, or in a network that the settings name."""
    plain = getattr(address, "ipv4_mapped", None) or address
    if any(plain in network for network in allowed):
        return True
    return plain.is_global and not plain.is_multicast and not _leads_inside(plain)


def _leads_inside(address: Address) -> bool:
    """Whether it is a site's own (which Python calls global), or leads to an IPv4 address (6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        return False
    translated = any(address in network for network in TRANSLATED)
    return bool(address.is_site_local or address.sixtofour or address.teredo or translated)
