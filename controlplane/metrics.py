"""`/metrics`: the whole fleet for Prometheus, read from Redis at the scrape, so that all web processes say the same."""

import uuid
from collections.abc import Mapping, Sequence

import msgspec
from django.conf import settings
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from controlplane.api.openai.exchange import Exchange, Receive, Scope, Send
from controlplane.metric_families import FleetReading, render_metrics
from controlplane.offline import is_web
from inference.directory import DirectoryWatch
from inference.gateway.errors import RedisUnavailable
from inference.gateway.gateway import Gateway
from scheduling.store import TIME, Command


async def answer_metrics(scope: Scope, receive: Receive, send: Send) -> None:
    """The text format, version 0.0.4."""
    directory: DirectoryWatch = scope["state"]["directory"]
    tenants = list(directory.current.tenants)[: settings.PENSTOCK.metrics_tenants]
    body = render_metrics(await read_fleet(scope["state"]["gateway"], tenants))
    kind = (b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode())
    await Exchange(scope, receive, send, uuid.uuid4().hex).respond(200, body, kind=kind)


async def read_fleet(gateway: Gateway, tenants: Sequence[str]) -> FleetReading:
    """Read Redis now, with these tenants by name; where it is away say so, and show nothing stale."""
    models = gateway.models.loaded()
    try:
        await gateway.monitor.tick(models)
        refusals = await gateway.pipeline.send(Command(("HGETALL", gateway.keys.refusals), _read_refusals))
        now_s = await gateway.pipeline.send(TIME)
        webs = Command(("ZRANGE", gateway.keys.webs, now_s, "+inf", "BYSCORE"), lambda names: sum(map(is_web, names)))
        web_processes = await gateway.pipeline.send(webs)
        history = await gateway.pipeline.send(Command(("XLEN", gateway.keys.history), int))
        alerts = await gateway.pipeline.send(Command(("GET", gateway.keys.alerts), _read_alerts))
    except RedisUnavailable:
        return FleetReading(redis_up=False, models={}, refusals={})
    return FleetReading(
        redis_up=True,
        time_s=now_s,
        models={model.name: gateway.status(model.name) for model in models},
        refusals=refusals,
        web_processes=web_processes,
        history_waiting=history,
        tenants=tenants,
        alerts=alerts,
    )


def _read_alerts(reply: bytes | None) -> list[tuple[str, str, int]] | None:
    """Rule, severity, and how many fire."""
    return None if reply is None else msgspec.json.decode(reply, type=list[tuple[str, str, int]])


def _read_refusals(reply: object) -> Mapping[tuple[str, str, str], int]:
    """Counts by model, tenant and reason. A model's name may hold a bar, the other two may not."""
    fields = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))  # type: ignore[index]
    counts: dict[tuple[str, str, str], int] = {}
    for name, count in fields.items():
        model, tenant, reason = name.decode().rsplit("|", 2)
        counts[model, tenant, reason] = int(count)
    return counts
