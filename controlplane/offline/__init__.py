"""Offline work as OpenAI has it: files of requests, answered within a day behind everything else."""

GATEWAY_PREFIX = "offline-"
"""Begins the name of the ops process's gateway, which reports among the web processes and is none."""


def is_web(name: bytes) -> bool:
    """Whether a gateway that reports is a web process's."""
    return not name.startswith(GATEWAY_PREFIX.encode())
