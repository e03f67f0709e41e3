"""What the pages' buttons ask for: posted forms, answered in JSON, errors in a sentence."""

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from django.contrib.auth.models import User
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.utils import timezone
from django.views.decorators.http import require_POST
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from dashboard.access import CANCEL_REQUEST, CONTROL_REPLICA, SWITCH_POLICY
from dashboard.cancelling import cancel_request
from dashboard.filters import Filters
from dashboard.guard import read_guard, switch_under_guard
from dashboard.history_form import SPANS
from dashboard.page import list_models
from dashboard.policy_form import read_params
from dashboard.replica_form import read_arguments
from dashboard.tasks import run_what_if
from dashboard.what_if import WhatIfError, ask_what_if
from dashboard.zone import reader_zone
from inference.control import send_control
from inference.services import announce_policy, control_replicas, read_replicas
from scheduling.connection import live_keys, live_redis
from scheduling.core.policies import PolicyError
from scheduling.models import PolicyRevision
from scheduling.policy_switch import switch_policy

log = logging.getLogger(__name__)
COMMANDS = {
    "pause": "is paused",
    "resume": "claims again",
    "drain": "is draining",
    "set_mode": "forms batches in another mode",
    "set_batch_size": "has another batch size",
    "sizing": "sizes its batches by another strategy",
}
"""What a worker does once it has confirmed."""
MAX_REASON = 500

View = Callable[..., HttpResponse]


def refuse(status: int, sentence: str, fields: Mapping[str, str] | None = None) -> JsonResponse:
    """An error as the page shows it; `fields` says which fields of the form are wrong, and how."""
    return JsonResponse({"error": sentence, "fields": dict(fields or {})}, status=status)


def operators_only(permission: str, *, with_reason: bool = True) -> Callable[[View], View]:
    """POST by a signed-in user who holds `permission`, with a reason; others get a sentence instead of a redirect."""

    def decorate(view: View) -> View:
        @require_POST
        @wraps(view)
        def guarded(request: HttpRequest, **arguments: str) -> HttpResponse:
            if not request.user.is_authenticated:
                return refuse(401, "Your session has ended. Sign in again and repeat.")
            if not request.user.has_perm(permission):
                return refuse(403, "Your account may look but not switch. Ask an administrator for the group operator.")
            if with_reason and not 0 < len(reason_of(request)) <= MAX_REASON:
                return refuse(400, f"Give a reason of at most {MAX_REASON} characters: it is kept in the audit trail.")
            try:
                return view(request, **arguments)
            except DatabaseError:
                log.exception("The database did not take %s", request.path)
                return refuse(503, "The database does not answer, so nothing was changed. Try again in a moment.")

        return guarded

    return decorate


@operators_only(SWITCH_POLICY)
def switch(request: HttpRequest, *, model: str) -> JsonResponse:
    """Order a model's queue by another policy."""
    name = request.POST.get("policy", "")
    if model not in list_models():
        return refuse(404, f"There is no model {model}; it may have been taken away. Load the page again.")
    try:
        params, problems = read_params(name, request.POST)
        guard, guard_problems = read_guard(request.POST)
        problems |= guard_problems
        if problems:
            return refuse(400, next(iter(problems.values())), fields=problems)
        order: dict[str, Any] = {
            "model": model, "name": name, "params": params,
            "actor": _actor(request), "reason": reason_of(request), "announce": _announce,
        }  # fmt: skip
        revision = switch_policy(**order) if guard is None else switch_under_guard(guard, **order)[0]
    except PolicyError as error:
        return refuse(400, str(error))
    return JsonResponse(
        {
            "model": model,
            "name": revision.name,
            "revision": revision.revision,
            "state": revision.state,
            "moved": revision.num_moved,
            "confirmed": _confirmed(revision.acknowledgements),
        }
    )


@operators_only(SWITCH_POLICY, with_reason=False)
def what_if(request: HttpRequest, *, model: str) -> JsonResponse:
    """Have recorded traffic replayed under the policies that were chosen, with the parameters that came for them."""
    with timezone.override(reader_zone(request)):
        filters = Filters(request.POST)
        since, until = filters.window()
    end = until or timezone.now()
    start = since or end - SPANS.get(filters.text("span"), SPANS["15m"])[1]
    problems = dict(filters.problems)
    try:
        candidates = []
        for name in request.POST.getlist("candidate"):
            params, wrong = read_params(name, request.POST)
            candidates.append({"policy": name, "params": params})
            problems |= {field: f"{name}: {sentence}" for field, sentence in wrong.items()}
        if problems:
            return refuse(400, next(iter(problems.values())), fields=problems)
        run = ask_what_if(model=model, start=start, end=end, candidates=candidates, actor=_actor(request))
        run_what_if.delay(run.pk)
    except (WhatIfError, PolicyError) as error:
        return refuse(400, str(error))
    except (OperationalError, RedisError, OSError):
        run.delete()
        return refuse(503, "The ops worker cannot be told: the queue's store does not answer.")
    return JsonResponse({"id": run.pk, "message": "The replay begins."})


@operators_only(CONTROL_REPLICA)
def control(request: HttpRequest, *, replica: str, command: str) -> JsonResponse:
    """Pause, resume or drain a worker, or change how it forms batches."""
    if command not in COMMANDS:
        return refuse(404, f"A worker knows the commands {', '.join(COMMANDS)}, not {command}.")
    arguments, problems = read_arguments(command, request.POST)
    if problems:
        return refuse(400, next(iter(problems.values())), fields=problems)
    try:
        if replica not in {status.replica for status in read_replicas(live_redis(), live_keys())}:
            return refuse(404, f"No worker {replica} is running.")
        acks = control_replicas(
            replicas=[replica],
            command=command,
            send=send_control,
            actor=_actor(request),
            reason=reason_of(request),
            **arguments,
        )
    except (RedisError, OSError):
        return refuse(503, f"{replica} could not be told: the queue's store does not answer.")
    ack = acks.get(replica)
    if not isinstance(ack, Mapping) or not ack.get("ok"):
        why = (ack.get("error") if isinstance(ack, Mapping) else None) or "no answer within two seconds"
        return refuse(502, f"{replica} did not confirm ({why}). It is written down, and taken up when it answers.")
    return JsonResponse({"message": f"{replica} {COMMANDS[command]}."})


@operators_only(CANCEL_REQUEST)
def cancel(request: HttpRequest, *, request_id: str) -> JsonResponse:
    """Take a request out of the queue, or stop it where it runs."""
    try:
        was = cancel_request(
            request_id=request_id, models=list_models(), actor=_actor(request), reason=reason_of(request)
        )
    except (RedisError, OSError):
        return refuse(503, "The queue's store does not answer, so the request could not be cancelled. Try again.")
    if was == "gone":
        return refuse(404, f"{request_id[:64]} neither waits nor runs; it may have ended meanwhile.")
    if was == "cancelling":
        return JsonResponse({"message": f"{request_id} is being cancelled already.", "was": was})
    done = "It has left the queue." if was == "queued" else "Its worker stops it at the next step."
    return JsonResponse({"message": f"{request_id} is cancelled. {done}", "was": was})


def _confirmed(acknowledgements: Mapping[str, Any]) -> dict[str, float]:
    """Replica -> milliseconds until it had taken the policy up; those that did not confirm are left out."""
    acks = {name: ack for name, ack in acknowledgements.items() if isinstance(ack, Mapping) and ack.get("ok")}
    return {name: float(ack.get("applied_ms") or 0.0) for name, ack in acks.items()}


def _announce(revision: PolicyRevision) -> Mapping[str, Any]:
    return announce_policy(revision, send_control)


def reason_of(request: HttpRequest) -> str:
    """Without NUL, which PostgreSQL refuses: else what was done already would lack its row in the audit trail."""
    return request.POST.get("reason", "").replace("\0", "").strip()


def _actor(request: HttpRequest) -> User:
    assert isinstance(request.user, User)
    return request.user
