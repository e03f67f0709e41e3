"""Posts a notice as JSON: signed, to the checked address alone, without redirects, and within a bounded time."""

import hashlib
import hmac
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Sequence

from dashboard.alerts.address import Address, AddressError, Network, Target, check_url, find_addresses

TIMEOUT_S = 10.0
"""For all but looking the name up, which the resolver bounds: connecting, TLS, sending, and the answer, however slowly
it drips."""
MAX_ANSWER = 4096


class DeliveryError(Exception):
    """The notice was not taken; the message says why, and is shown to operators."""


def sign(secret: str, time_s: int, body: bytes) -> str:
    """The value of Penstock-Signature: HMAC-SHA256 of `TIME.BODY`. The time lets a receiver refuse what is old."""
    digest = hmac.new(secret.encode(), f"{time_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={time_s},v1={digest}"


def post_notice(url: str, body: bytes, headers: dict[str, str], allowed: Sequence[Network]) -> None:
    """One try. Raises DeliveryError unless the receiver answers with a status of 200 to 299."""
    try:
        target = check_url(url)
        connection = _Connection(target, find_addresses(target, allowed))
    except AddressError as error:
        raise DeliveryError(str(error)) from error
    # The socket's own timeout holds for each read alone.
    watchdog = threading.Timer(TIMEOUT_S, connection.cut)
    watchdog.start()
    try:
        connection.request("POST", target.path, body, {"Host": target.netloc, **headers})
        answer = connection.getresponse()
        answer.read(MAX_ANSWER)
        if connection.was_cut:  # what was read until then looks like the end of an answer
            raise TimeoutError
    except (OSError, http.client.HTTPException) as error:
        late = " in time" if connection.was_cut or isinstance(error, TimeoutError) else ""
        raise DeliveryError(f"{target.host} did not take it{late} ({type(error).__name__}).") from error
    finally:
        watchdog.cancel()
        connection.close()
    if 300 <= answer.status < 400:
        raise DeliveryError(f"{target.host} answered with a redirect ({answer.status}), which is not followed.")
    if not 200 <= answer.status < 300:
        raise DeliveryError(f"{target.host} answered with status {answer.status}.")


class _Connection(http.client.HTTPConnection):
    """A connection to one of these addresses, under the host's name: the name is not looked up again."""

    def __init__(self, target: Target, addresses: Sequence[Address]) -> None:
        super().__init__(target.host, target.port, timeout=TIMEOUT_S)
        self._target = target
        self._addresses = addresses
        self.was_cut = False

    def connect(self) -> None:
        """Connect, and check the certificate against the host's name."""
        self.sock = self._connect_any(time.monotonic() + TIMEOUT_S)
        if self._target.scheme == "https":
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self._target.host, do_handshake_on_connect=False)
            self.sock.do_handshake()

    def _connect_any(self, end_s: float) -> socket.socket:
        """The first address that answers: a host may have one of a family that this machine has no route for."""
        problem: OSError = TimeoutError()
        for address in self._addresses:
            if (left_s := end_s - time.monotonic()) <= 0:
                break
            try:
                return socket.create_connection((str(address), self._target.port), left_s)
            except OSError as error:
                problem = error
        raise problem

    def cut(self) -> None:
        """End it from another thread; whoever waits for the socket gets an error."""
        self.was_cut = True
        try:
            if self.sock is not None:
                self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended already
            return
