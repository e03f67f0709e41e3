"""Where an upstream server is and what lets one in: what an operator may write, and what is made of it."""

import re
from urllib.parse import SplitResult, urlsplit

MAX_LENGTH = 500
KEY_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,60}_API_KEY")
"""Variables that may be named: a name that anybody could choose would let an administrator send any secret of the
process, such as the database's address, to a server of his own."""


class AddressError(ValueError):
    """The address or the key's name cannot be used; the message says why and what to write."""


def check_address(url: str) -> str:
    """A base address as it is kept: without a slash at its end, with `/v1` where no path was given.

    Raises AddressError.
    """
    url = url.strip()
    if not url:
        raise AddressError("Give the server's base address, such as http://127.0.0.1:8000/v1.")
    if len(url) > MAX_LENGTH or not url.isprintable() or " " in url:
        raise AddressError(f"An address has at most {MAX_LENGTH} characters, and no spaces or control characters.")
    parts = _split(url)
    if parts.scheme not in ("http", "https"):
        raise AddressError(f"Only http and https can be used, not {parts.scheme or 'an address without either'}.")
    if not parts.hostname:
        raise AddressError("The address names no host; write it as http://127.0.0.1:8000/v1.")
    if parts.username is not None or parts.password is not None:
        raise AddressError(
            "A user name or password must not stand in the address: who may see the fleet sees it. Put the key into "
            "an environment variable of the gpu worker and name that."
        )
    if parts.query or parts.fragment:
        raise AddressError("The address has no query and no fragment; write it up to /v1.")
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        if path.endswith(ending):
            raise AddressError(f"Write the base address, without {ending}.")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def check_key_name(name: str) -> str:
    """The name of an environment variable, as it is kept. Raises AddressError."""
    name = name.strip()
    if name and not KEY_NAME.fullmatch(name):
        raise AddressError(
            "Name an environment variable that ends in _API_KEY, such as VLLM_API_KEY; never write the key itself."
        )
    return name


def root_of(url: str) -> str:
    """The address of the server itself, where `/health` is."""
    parts = _split(url)
    return f"{parts.scheme}://{parts.netloc}"


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # a number, or ValueError
    except ValueError as error:
        raise AddressError(f"The address cannot be read: {error}.") from error
    return parts
