"""A web process on a socket that the supervisor listens on: `python -m controlplane.webserver FD`."""

import socket
import sys

import uvicorn

from controlplane.config import load_config

SHUTDOWN_S = 5


def main() -> None:
    """Serve until SIGTERM, then let what runs end.

    Uvicorn's own `--fd` takes the socket for a unix one and leaves out TCP_NODELAY, which delays streamed tokens.
    """
    config = load_config()
    server = uvicorn.Server(
        uvicorn.Config(
            "controlplane.asgi:application",
            loop="asyncio",
            http="httptools",
            ws="websockets-sansio",
            lifespan="on",
            access_log=False,
            server_header=False,
            backlog=2048,
            timeout_graceful_shutdown=SHUTDOWN_S,
            log_config=None,  # as the settings have it for all of our processes
            log_level=config.log_level.lower(),
            proxy_headers=True,
            forwarded_allow_ips=config.proxies,
        )
    )
    server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
    if not server.started:
        sys.exit(3)


if __name__ == "__main__":
    main()
