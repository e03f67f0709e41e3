"""`/metrics`: the whole fleet for Prometheus, read from Redis at the scrape, so that all web processes say the same."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from controlplane.api.openai.exchange import Exchange, Receive, Scope, Send
from inference.gateway.errors import RedisUnavailable
from inference.gateway.gateway import Gateway
from inference.gateway.monitor import FleetStatus
from inference.messages import LATENCY_BUCKETS_S, Histogram, ReplicaState, ReplicaStatus
from scheduling.core.request import Priority
from scheduling.store import TIME, Command

PREFIX = "penstock_"
MODEL = ["model_name"]
REPLICA = ["model_name", "replica"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReading:
    """What one scrape shows."""

    redis_up: bool
    models: Mapping[str, FleetStatus]
    refusals: Mapping[tuple[str, str], int]
    """By model and reason, over all tenants."""
    web_processes: int = 0


async def answer_metrics(scope: Scope, receive: Receive, send: Send) -> None:
    """The text format, version 0.0.4."""
    reading = await read_fleet(scope["state"]["gateway"])
    body = render_metrics(reading)
    kind = (b"content-type", CONTENT_TYPE_PLAIN_0_0_4.encode())
    await Exchange(scope, receive, send, uuid.uuid4().hex).respond(200, body, kind=kind)


async def read_fleet(gateway: Gateway) -> FleetReading:
    """Read Redis now; where it is away say so, and show nothing stale."""
    models = gateway.models.loaded()
    try:
        await gateway.monitor.tick(models)
        refusals = await gateway.pipeline.send(Command(("HGETALL", gateway.keys.refusals), _read_refusals))
        now_s = await gateway.pipeline.send(TIME)
        count = Command(("ZCOUNT", gateway.keys.webs, now_s, "+inf"), int)
        web_processes = await gateway.pipeline.send(count)
    except RedisUnavailable:
        return FleetReading(redis_up=False, models={}, refusals={})
    statuses = {model.name: gateway.status(model.name) for model in models}
    return FleetReading(redis_up=True, models=statuses, refusals=refusals, web_processes=web_processes)


def render_metrics(reading: FleetReading) -> bytes:
    """A reading in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(reading))
    return generate_latest(registry)


class FleetCollector(Collector):
    """Turns a reading into metric families. Labels are models, replicas, and fixed words: never tenants or requests."""

    def __init__(self, reading: FleetReading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        """Every family once."""
        yield GaugeMetricFamily(
            PREFIX + "redis_up", "Whether Redis answered this scrape.", float(self._reading.redis_up)
        )
        yield GaugeMetricFamily(PREFIX + "web_processes", "Live web processes.", self._reading.web_processes)
        yield from self._queues()
        replicas = [replica for status in self._reading.models.values() for replica in status.replicas]
        yield from _replica_gauges(replicas)
        yield from _replica_counters(replicas)
        yield from _latencies(replicas)
        yield from _devices(replicas)

    def _queues(self) -> Iterator[Metric]:
        running = _gauge("num_requests_running", "Requests in a batch.", MODEL)
        waiting = _gauge("num_requests_waiting", "Requests in the queue.", MODEL)
        by_priority = _gauge("num_requests_waiting_by_priority", "Requests in the queue.", [*MODEL, "priority"])
        level = _gauge("backpressure_level", "Backpressure, 0 (none) to 4 (critical).", MODEL)
        kv_usage = _gauge("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", MODEL)
        revision = _gauge("policy_revision", "Revision of the active policy.", [*MODEL, "policy"])
        requeued = _counter("requests_requeued", "Requests put back after a worker was lost or drained.", MODEL)
        cancelled = _counter("requests_cancelled_waiting", "Requests cancelled in the queue.", MODEL)
        for model, status in self._reading.models.items():
            snapshot = status.snapshot
            if snapshot is None:
                continue
            running.add_metric([model], snapshot.running)
            waiting.add_metric([model], snapshot.depth)
            for priority in Priority:
                by_priority.add_metric([model, priority.name.lower()], snapshot.by_priority.get(priority, 0))
            level.add_metric([model], status.assessment.level)
            kv_usage.add_metric([model], status.kv_usage)
            revision.add_metric([model, snapshot.policy], snapshot.revision)
            requeued.add_metric([model], snapshot.requeued_total)
            cancelled.add_metric([model], snapshot.cancelled_total)
        yield from (running, waiting, by_priority, level, kv_usage, revision, requeued, cancelled)
        refused = _counter("requests_refused", "Requests refused at admission.", [*MODEL, "reason"])
        for (model, reason), count in self._reading.refusals.items():
            refused.add_metric([model, reason], count)
        yield refused


def _replica_gauges(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    state = _gauge("replica_state", "1 for the state the replica is in.", [*REPLICA, "state"])
    batch = _gauge("batch_size", "Sequences in the running batch.", REPLICA)
    rate = _gauge("generation_tokens_per_second", "Output tokens a second over the last second.", REPLICA)
    step = _gauge("step_time_seconds", "Time of an engine step over the last second.", [*REPLICA, "quantile"])
    for replica in replicas:
        labels = [replica.model, replica.replica]
        for name in get_args(ReplicaState):
            state.add_metric([*labels, name], float(replica.state == name))
        batch.add_metric(labels, len(replica.slots))
        rate.add_metric(labels, replica.tokens_per_s)
        step.add_metric([*labels, "0.5"], replica.step_ms_p50 / 1000)
        step.add_metric([*labels, "0.99"], replica.step_ms_p99 / 1000)
    yield from (state, batch, rate, step)


def _replica_counters(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    prompt = _counter("prompt_tokens", "Prompt tokens computed.", REPLICA)
    generated = _counter("generation_tokens", "Output tokens sampled.", REPLICA)
    preempted = _counter("num_preemptions", "Sequences preempted for memory.", REPLICA)
    ended = _counter("request_success", "Requests ended, by finish reason.", [*REPLICA, "finished_reason"])
    steps = _counter("engine_steps", "Engine steps.", REPLICA)
    for replica in replicas:
        labels = [replica.model, replica.replica]
        prompt.add_metric(labels, replica.prompt_tokens)
        generated.add_metric(labels, replica.output_tokens)
        preempted.add_metric(labels, replica.preemptions)
        steps.add_metric(labels, replica.steps)
        for reason, count in replica.finished.items():
            ended.add_metric([*labels, reason], count)
    yield from (prompt, generated, preempted, ended, steps)


def _latencies(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    for name, text, field in (
        ("request_queue_time_seconds", "Time from arrival to claim.", "queue_time"),
        ("time_to_first_token_seconds", "Time from arrival to the first token.", "time_to_first_token"),
        ("time_per_output_token_seconds", "Mean time between output tokens of a request.", "time_per_output_token"),
        ("e2e_request_latency_seconds", "Time from arrival to the end.", "end_to_end"),
    ):
        family = HistogramMetricFamily(PREFIX + name, text, labels=REPLICA)
        for replica in replicas:
            histogram: Histogram | None = getattr(replica, field)
            if histogram is not None:
                family.add_metric([replica.model, replica.replica], _buckets(histogram), histogram.sum_s)
        yield family


def _devices(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    labels = [*REPLICA, "device", "source"]
    families = {
        "utilization_percent": _gauge("device_utilization_percent", "Utilisation of the device.", labels),
        "memory_used_bytes": _gauge("device_memory_used_bytes", "Memory in use.", labels),
        "memory_total_bytes": _gauge("device_memory_total_bytes", "Memory there is.", labels),
        "temperature_c": _gauge("device_temperature_celsius", "Temperature.", labels),
        "power_w": _gauge("device_power_watts", "Power drawn.", labels),
    }
    for replica in replicas:
        telemetry = replica.telemetry
        for field, family in families.items():
            if telemetry is not None and (value := getattr(telemetry, field)) is not None:
                family.add_metric([replica.model, replica.replica, telemetry.device, telemetry.source], value)
    yield from families.values()


def _gauge(name: str, text: str, labels: Sequence[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def _counter(name: str, text: str, labels: Sequence[str]) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, LATENCY_BUCKETS_S), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def _read_refusals(reply: object) -> dict[tuple[str, str], int]:
    """Sum of `model|tenant|reason` over tenants. A model's name may hold a bar, the other two may not."""
    fields = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))  # type: ignore[index]
    sums: dict[tuple[str, str], int] = {}
    for name, count in fields.items():
        model, _, reason = name.decode().rsplit("|", 2)
        sums[model, reason] = sums.get((model, reason), 0) + int(count)
    return sums
