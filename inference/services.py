"""Writes to deployments and replicas, and the control of replicas: audited, published for gpu workers."""

import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import redis
from django.contrib.auth.models import User
from django.db import DatabaseError, transaction
from django.utils import timezone
from redis.exceptions import RedisError

from inference.checkpoint import CheckpointInfo, inspect_checkpoint
from inference.directory import load_directory, publish_deployments
from inference.messages import ReplicaStatus
from inference.models import BatchRecord, ModelDeployment, Replica, RequestRecord
from inference.replicas import publish_wanted, remember_commands, take_back_commands
from inference.worker.rollout import OVERRIDES
from scheduling.audit import record_action
from scheduling.connection import live_keys, live_redis
from scheduling.keys import Keys
from scheduling.models import PolicyRevision
from scheduling.services import config_changed

logger = logging.getLogger(__name__)

SendControl = Callable[..., Mapping[str, Any]]
"""`send(replicas, command, **arguments)` answers each replica's acknowledgement."""

GATES = {"pause": "paused", "resume": "ready", "drain": "draining"}
"""Commands that change whether a replica claims, and the state that they lead to."""
LOST_AFTER_S = 10.0
FIRST_CONCURRENCY = 4
"""Requests at once with an upstream server to begin with: what its latency is at best, few of them tell."""
ROWS_PER_DELETE = 2000


def register_deployment(
    *, name: str, path: Path, actor: User | None = None, reason: str = "", **options: Any
) -> tuple[ModelDeployment, CheckpointInfo]:
    """Offer a checkpoint under a name, or change how one is served. `options` are fields of ModelDeployment.

    Raises CheckpointError where the checkpoint cannot be served, ValidationError for a bad name or option.
    """
    info = inspect_checkpoint(path.resolve())
    values = {"path": str(path.resolve()), "architecture": info.architecture, "num_parameters": info.num_parameters}
    values |= {"backend": ModelDeployment.Backend.BUILTIN, "upstream_url": ""}
    with transaction.atomic():
        deployment = ModelDeployment.objects.select_for_update().filter(name=name).first() or ModelDeployment(name=name)
        action = "deployment.update" if deployment.pk else "deployment.create"
        save_deployment(deployment=deployment, changes=values | options, action=action, actor=actor, reason=reason)
    return deployment, info


def register_upstream(
    *, name: str, url: str, actor: User | None = None, reason: str = "", **options: Any
) -> ModelDeployment:
    """Offer what an OpenAI-compatible server serves under a name, or change how.

    `options` are fields of ModelDeployment. Raises ValidationError for a bad name, address or option.
    """
    values: dict[str, Any] = {"backend": ModelDeployment.Backend.OPENAI, "upstream_url": url}
    with transaction.atomic():
        deployment = ModelDeployment.objects.select_for_update().filter(name=name).first()
        action = "deployment.update" if deployment else "deployment.create"
        if deployment is None or not deployment.is_upstream:  # of a checkpoint nothing is left over
            values |= {"path": "", "sizing": ModelDeployment.Sizing.GRADIENT, "sizing_params": {}, "mode": "continuous"}
            values |= {"speculation": ModelDeployment.Speculation.OFF, "draft_path": ""}
            values |= {"architecture": "", "num_parameters": None, "max_batch_size": FIRST_CONCURRENCY}
        deployment = deployment or ModelDeployment(name=name)
        save_deployment(deployment=deployment, changes=values | options, action=action, actor=actor, reason=reason)
    return deployment


@transaction.atomic
def save_deployment(
    *,
    deployment: ModelDeployment,
    changes: Mapping[str, Any],
    action: str = "deployment.update",
    actor: User | None = None,
    reason: str = "",
) -> None:
    """Change fields of a deployment and publish it. Raises ValidationError."""
    before = {field: getattr(deployment, field) for field in changes} if deployment.pk else {}
    changed = {field for field, value in before.items() if value != changes[field]}
    taken_back = [kind for kind, fields in OVERRIDES.items() if fields & changed]
    if taken_back:
        take_back_commands(model=deployment.name, kinds=taken_back)
    for field, value in changes.items():
        setattr(deployment, field, value)
    deployment.full_clean()
    deployment.save()
    record_action(actor=actor, action=action, target=deployment.name, before=before, after=changes, reason=reason)
    deployments_changed()


def deployments_changed() -> None:
    """In the transaction of a change: count the configuration up, and publish once it is committed."""
    config_changed()
    transaction.on_commit(publish)


def publish() -> bool:
    """Bring plan and deployments in Redis up to date; True where these changed. A periodic task repeats what fails.

    The plan goes first: a worker that sees a changed deployment must not find in it what the change took back.
    """
    publish_wanted()
    try:
        return publish_deployments(live_redis(), live_keys(), load_directory())
    except (RedisError, OSError) as error:
        logger.warning("Redis does not answer (%s); deployments are published when it is back.", error)
        return False


def control_replicas(
    *,
    replicas: list[str],
    command: str,
    send: SendControl,
    actor: User | None = None,
    reason: str = "",
    **arguments: Any,
) -> dict[str, Any]:
    """Want replicas to obey a command and write down who did so, then tell them and write down what each answered.

    What one does not hear now it takes up from the plan; one that starts anew is told again. Raises DatabaseError
    where that cannot be kept; then none was told.
    """
    told = _read_told(command)
    with transaction.atomic():
        remember_commands(names=replicas, command=command, arguments=arguments)
        for name in replicas:
            before, after = told.get(name, {}), _wanted(command, arguments)
            record_action(
                actor=actor, action=f"replica.{command}", target=name, before=before, after=after, reason=reason
            )
    acknowledgements = dict(send(replicas, command, **arguments))
    _record_answers(acknowledgements, actor, command)
    return acknowledgements


def _record_answers(acknowledgements: Mapping[str, Any], actor: User | None, command: str) -> None:
    """The command holds by now, so a database that does not take its answers must not make it look refused."""
    try:
        for name, answer in acknowledgements.items():
            after = {"command": command, "acknowledgements": {name: answer}}
            record_action(actor=actor, action="replica.answer", target=name, after=after)
    except DatabaseError:
        logger.exception("The answers to %s are not in the audit trail: %s", command, acknowledgements)


def _wanted(command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a command makes of a replica, under the names of `_read_told`."""
    if command in GATES:
        return {"state": GATES[command]}
    if command == "sizing":
        return {"sizing": arguments["name"], "params": arguments["params"]}
    return dict(arguments)


def _read_told(command: str) -> dict[str, dict[str, Any]]:
    """Replica -> what of it a command is about to change; nothing while Redis is away."""
    try:
        statuses = read_replicas(live_redis(), live_keys())
    except (RedisError, OSError):
        return {}
    if command in GATES:
        return {status.replica: {"state": status.state} for status in statuses}
    if command == "sizing":
        return {s.replica: {"sizing": s.sizing, "params": dict(s.sizing_params)} for s in statuses}
    name = "mode" if command == "set_mode" else "max_batch_size"
    return {status.replica: {name: getattr(status, name)} for status in statuses}


def announce_policy(revision: PolicyRevision, send: SendControl) -> dict[str, Any]:
    """Tell the live replicas of a revision's model about it; their acknowledgements."""
    statuses = read_replicas(live_redis(), live_keys())
    names = [s.replica for s in statuses if s.model == revision.model]
    return dict(send(names, "policy", revision=revision.revision, name=revision.name)) if names else {}


def read_replicas(client: redis.Redis, keys: Keys) -> list[ReplicaStatus]:
    """What the replicas that are alive say of themselves."""
    names = [_text(name) for name in client.zrange(keys.replicas, 0, -1)]
    values: list[Any] = client.mget([keys.replica(name) for name in names]) if names else []
    return [msgspec.msgpack.decode(value, type=ReplicaStatus) for value in values if value is not None]


def record_replicas(client: redis.Redis, keys: Keys, *, now_s: float | None = None) -> int:
    """Keep the table of replicas up to date with what Redis heard of them; the number that are alive."""
    alive = read_replicas(client, keys)
    for status in alive:
        seen = {
            "model": status.model,
            "host": status.host[:255],
            "device": (status.telemetry.device if status.telemetry else "")[:255],
            "state": status.state,
            "detail": status.detail,
            "started_at": _moment(status.started_s),
            "last_seen_at": _moment(status.time_s),
        }
        Replica.objects.update_or_create(name=status.replica, defaults=seen)
    silent_since = _moment((time.time() if now_s is None else now_s) - LOST_AFTER_S)
    silent = Replica.objects.filter(last_seen_at__lt=silent_since).exclude(state__in=["stopped", "failed", "lost"])
    silent.exclude(name__in=[s.replica for s in alive]).update(state="lost")
    return len(alive)


def prune_history(*, days: int) -> int:
    """Delete request and batch records older than `days`, a few at a time so that writers get between; how many."""
    oldest = timezone.now() - timedelta(days=days)
    num_deleted = 0
    for rows in (RequestRecord.objects.filter(finished_at__lt=oldest), BatchRecord.objects.filter(second__lt=oldest)):
        while ids := list(rows.values_list("id", flat=True)[:ROWS_PER_DELETE]):
            num_deleted += rows.model.objects.filter(id__in=ids).delete()[0]
    return num_deleted


def _moment(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
