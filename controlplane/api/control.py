"""Control of replicas for operators: pause, resume, drain, batch mode, batch size and sizing, while they serve."""

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.models import User
from django.http import HttpRequest
from ninja import Router
from redis.exceptions import RedisError

from controlplane.api.access import ControlAuth
from controlplane.api.schemas import AckView, ControlBody
from inference.control import send_control
from inference.gateway.errors import InvalidRequest, NotFound, RedisUnavailable, Unavailable
from inference.services import control_replicas, read_replicas
from scheduling.connection import live_keys, live_redis
from scheduling.core.sizing.strategies import build_sizing

router = Router(tags=["fleet"])

ARGUMENTS = {"set_mode": "mode", "set_batch_size": "max_batch_size", "sizing": "sizing"}
"""The commands that need an argument, and which."""


@router.post(
    "/replicas/{replica}/control", response=AckView, auth=ControlAuth(), summary="Steer a replica while it serves"
)
def control_replica(request: HttpRequest, replica: str, body: ControlBody) -> AckView:
    """For operators, by session and CSRF token. Obeyed between two steps, recorded with the reason.

    It holds, also where the replica starts anew, until another command or the deployment says otherwise. Requests that
    run go on: a smaller batch is reached as they end.
    """
    arguments = _read_arguments(body)
    user = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    try:
        if replica not in {status.replica for status in read_replicas(live_redis(), live_keys())}:
            raise NotFound(f"No replica {replica[:100]!r} is running.", code="replica_not_found")
    except (RedisError, OSError) as error:
        raise RedisUnavailable("Redis does not answer, so the replica cannot be told.") from error
    acks = control_replicas(
        replicas=[replica], command=body.command, send=send_control, actor=user, reason=body.reason, **arguments
    )
    return _confirmed(replica, body.command, acks.get(replica))


def _read_arguments(body: ControlBody) -> dict[str, Any]:
    """What the command takes along. Raises InvalidRequest where it is missing, or belongs to another command, or
    SizingError.
    """
    needed = ARGUMENTS.get(body.command)
    for name in ARGUMENTS.values():
        if (getattr(body, name) is None) == (name == needed):
            problem = f"{body.command} needs {name}." if name == needed else f"{body.command} takes no {name}."
            raise InvalidRequest(problem, param=name)
    if body.params is not None and body.command != "sizing":
        raise InvalidRequest(f"{body.command} takes no params.", param="params")
    if body.command == "sizing":
        assert body.sizing is not None
        build_sizing(body.sizing, body.params)
        return {"name": body.sizing, "params": body.params or {}}
    return {} if needed is None else {needed: getattr(body, needed)}


def _confirmed(replica: str, command: str, ack: object) -> AckView:
    """Raises Unavailable where the replica did not say that it obeyed."""
    if not isinstance(ack, Mapping) or not ack.get("ok"):
        why = (ack.get("error") if isinstance(ack, Mapping) else "") or "No answer."
        raise Unavailable(
            f"{replica} did not confirm: {why} It is written down, and taken up when it answers.",
            code="replica_not_confirmed",
        )
    return AckView(replica=replica, command=command, state=ack.get("state", ""), applied_ms=ack.get("applied_ms", 0.0))
