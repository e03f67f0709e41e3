"""The web process's side of the queue: admission, replies of running requests, cancellation, live fleet status."""

from inference.gateway.admission import Draft
from inference.gateway.gateway import Gateway, Reply
from inference.gateway.monitor import FleetStatus
from inference.gateway.served import ServedModel

__all__ = ["Draft", "FleetStatus", "Gateway", "Reply", "ServedModel"]
