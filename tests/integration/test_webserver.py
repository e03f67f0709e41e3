"""How the web process is served."""

import openai

from controlplane.config import load_config
from controlplane.webserver import configure


def test_clients_let_go_of_idle_connections_before_the_server_does() -> None:
    limits = openai.DEFAULT_CONNECTION_LIMITS
    assert limits.keepalive_expiry is not None
    assert configure(load_config()).timeout_keep_alive > 10 * limits.keepalive_expiry
