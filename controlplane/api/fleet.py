"""Queues, replicas and policies for reading, and the switch of a policy for operators."""

import time
from collections.abc import Mapping
from typing import Any

from django.contrib.auth.models import User
from django.http import HttpRequest
from ninja import Router

from controlplane.api.access import KeyAuth, OperatorAuth, ViewerAuth, find_gateway
from controlplane.api.caller import Caller
from controlplane.api.schemas import (
    ActivePolicyView,
    ParameterView,
    PoliciesView,
    PolicyKindView,
    QueueView,
    ReplicaView,
    RevisionView,
    SizeChangeView,
    SizingKindView,
    SlotView,
    SwitchBody,
    TelemetryView,
)
from inference.control import send_control
from inference.gateway.errors import NotFound, Unavailable
from inference.gateway.gateway import Gateway
from inference.messages import ReplicaStatus
from inference.services import announce_policy
from scheduling.core.policies import POLICIES
from scheduling.core.policy import Parameter, PolicyKind
from scheduling.core.request import Priority
from scheduling.core.sizing.strategies import SIZINGS
from scheduling.models import PolicyRevision
from scheduling.policy_switch import switch_policy

router = Router(tags=["fleet"])
READERS = [KeyAuth(), ViewerAuth()]

# The views are sync: a session is read from the database, and that belongs into a thread.


@router.get("/queues", response=list[QueueView], auth=READERS, summary="Every model's queue")
def list_queues(request: HttpRequest) -> list[QueueView]:
    """Depth, waits, backpressure and policy as this process read them within the last quarter of a second."""
    gateway = find_gateway(request)
    caller = _tenant_of(request)
    return [_queue_view(m.name, gateway, caller) for m in gateway.models.loaded()]


@router.get("/replicas", response=list[ReplicaView], auth=READERS, summary="Every engine process")
def list_replicas(request: HttpRequest) -> list[ReplicaView]:
    """State, batch with what runs in it, KV use, speed, batch size and why, device."""
    gateway, caller = find_gateway(request), _tenant_of(request)
    return [_replica_view(r, caller) for m in gateway.models.loaded() for r in gateway.status(m.name).replicas]


@router.get("/policies", response=PoliciesView, auth=READERS, summary="Policies there are and in force")
def list_policies(request: HttpRequest) -> PoliciesView:
    """Kinds with their parameters and guarantees, and each queue's active one."""
    gateway = find_gateway(request)
    active = [
        ActivePolicyView(model=model.name, name=at.policy, params=dict(at.params), revision=at.revision)
        for model in gateway.models.loaded()
        if (at := gateway.status(model.name).snapshot) is not None
    ]
    return PoliciesView(kinds=[_policy_kind(kind) for kind in POLICIES.values()], active=active)


@router.get("/policies/{name}", response=PolicyKindView, auth=READERS, summary="A policy's parameters")
def show_policy(request: HttpRequest, name: str) -> PolicyKindView:
    """What a form for its parameters needs: type, default, bounds or choices, and a sentence for each."""
    kind = POLICIES.get(name)
    if kind is None:
        raise NotFound(f"There is no policy {name[:64]!r}; there are {', '.join(POLICIES)}.", code="policy_not_found")
    return _policy_kind(kind)


@router.get("/sizings", response=list[SizingKindView], auth=READERS, summary="Strategies that set batch sizes")
def list_sizings(request: HttpRequest) -> list[SizingKindView]:
    """With their parameters, for the command `sizing` of a replica."""
    return [
        SizingKindView(name=kind.name, description=kind.description, parameters=_parameters(kind.parameters))
        for kind in SIZINGS.values()
    ]


@router.post("/models/{path:model}/policy", response=RevisionView, auth=OperatorAuth(), summary="Switch a policy")
def switch_model_policy(request: HttpRequest, model: str, body: SwitchBody) -> RevisionView:
    """For operators, by session and CSRF token. Takes effect at once; the answer says which workers have confirmed."""
    gateway = find_gateway(request)
    gateway.find_model(model)
    user = request.auth  # type: ignore[attr-defined]
    assert isinstance(user, User)
    revision = switch_policy(
        model=model, name=body.name, params=body.params, actor=user, reason=body.reason, announce=_announce
    )
    if revision.state == revision.State.PENDING:
        raise Unavailable(
            "Redis does not answer; the switch is recorded and follows when it does.", code="redis_unavailable"
        )
    return RevisionView(
        model=model,
        revision=revision.revision,
        name=revision.name,
        params=revision.params,
        state=revision.state,
        num_moved=revision.num_moved or 0,
        seconds=revision.seconds,
        acknowledgements=revision.acknowledgements or {},
    )


def _announce(revision: PolicyRevision) -> dict[str, Any]:
    return announce_policy(revision, send_control)


def _tenant_of(request: HttpRequest) -> Caller | None:
    """Who calls with a tenant's key; None for a user."""
    return request.auth if isinstance(request.auth, Caller) else None  # type: ignore[attr-defined]


def _queue_view(model: str, gateway: Gateway, caller: Caller | None) -> QueueView:
    status = gateway.status(model)
    snapshot = status.snapshot
    if snapshot is None:
        raise Unavailable("The queue has not been read yet.", code="redis_unavailable")
    tenants = snapshot.by_tenant
    if caller is not None:
        tenants = {caller.tenant.name: tenants.get(caller.tenant.name, 0)}
    oldest = snapshot.oldest_arrival_s
    return QueueView(
        model=model,
        depth=snapshot.depth,
        waiting_tokens=snapshot.waiting_tokens,
        running=snapshot.running,
        by_priority={p.name.lower(): snapshot.by_priority.get(p, 0) for p in Priority},
        by_tenant=tenants,
        oldest_wait_s=None if oldest is None else max(0.0, time.time() - oldest),
        estimated_wait_s=status.estimated_wait_s,
        backpressure=status.assessment.level.name.lower(),
        backpressure_reason=status.assessment.reason,
        replicas=len(status.replicas),
        refused_because=gateway.desk.why_unserved(model),
        policy=snapshot.policy,
        policy_params=dict(snapshot.params),
        policy_revision=snapshot.revision,
    )


def _replica_view(replica: ReplicaStatus, caller: Caller | None) -> ReplicaView:
    slots = [slot for slot in replica.slots if caller is None or slot.tenant == caller.tenant.name]
    telemetry = replica.telemetry if caller is None else None
    return ReplicaView(
        replica=replica.replica,
        model=replica.model,
        state=replica.state,
        detail=replica.detail,
        mode=replica.mode,
        batch_size=len(replica.slots),
        max_batch_size=replica.max_batch_size,
        kv_usage=replica.kv_blocks_used / replica.kv_blocks_total if replica.kv_blocks_total else 0.0,
        tokens_per_s=replica.tokens_per_s,
        step_ms_p50=replica.step_ms_p50,
        step_ms_p99=replica.step_ms_p99,
        policy=replica.policy,
        policy_revision=replica.policy_revision,
        heard_s_ago=max(0.0, time.time() - replica.time_s),
        started_s=replica.started_s,
        slots=[SlotView.from_orm(slot) for slot in slots],
        telemetry=None if telemetry is None else TelemetryView.from_orm(telemetry),
        sizing=replica.sizing,
        sizing_params=replica.sizing_params,
        size_changes=[SizeChangeView.from_orm(change) for change in replica.size_changes],
        triggers=replica.triggers,
        preemptions=replica.preemptions,
        restarts=replica.restarts,
    )


def _policy_kind(kind: PolicyKind) -> PolicyKindView:
    return PolicyKindView(
        name=kind.name,
        description=kind.description,
        guarantee=kind.guarantee,
        source=kind.source,
        parameters=_parameters(kind.parameters),
    )


def _parameters(specs: Mapping[str, Parameter]) -> dict[str, ParameterView]:
    return {
        name: ParameterView(
            type="choice" if spec.choices else "number",
            default=spec.default,
            minimum=spec.minimum,
            maximum=spec.maximum,
            description=spec.description,
            choices=list(spec.choices),
        )
        for name, spec in specs.items()
    }
