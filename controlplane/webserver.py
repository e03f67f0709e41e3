"""A web process on a socket that the supervisor listens on: `python -m controlplane.webserver FD`."""

import socket
import sys

import uvicorn

from controlplane.config import Config, load_config

SHUTDOWN_S = 5
KEEP_ALIVE_S = 75
"""How long a connection may idle. Clients should let go first (httpx does after 5 s, load balancers after 60 s): who
sends a request while the server closes its connection cannot know whether that arrived."""


def configure(config: Config) -> uvicorn.Config:
    """How uvicorn serves."""
    return uvicorn.Config(
        "controlplane.asgi:application",
        loop="asyncio",
        http="httptools",
        ws="websockets-sansio",
        lifespan="on",
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
        log_config=None,  # as the settings have it for all of our processes
        log_level=config.log_level.lower(),
        proxy_headers=True,
        forwarded_allow_ips=config.proxies,
    )


def main() -> None:
    """Serve until SIGTERM, then let what runs end.

    Uvicorn's own `--fd` takes the socket for a unix one and leaves out TCP_NODELAY, which delays streamed tokens.
    """
    server = uvicorn.Server(configure(load_config()))
    server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
    if not server.started:
        sys.exit(3)


if __name__ == "__main__":
    main()
