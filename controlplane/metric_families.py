"""A reading of the fleet as Prometheus's metric families, under vLLM's names where vLLM has them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from controlplane import VERSION
from inference.gateway.monitor import FleetStatus
from inference.messages import LATENCY_BUCKETS_S, Histogram, ReplicaState, ReplicaStatus, Telemetry
from scheduling.core.request import Priority

PREFIX = "penstock_"
MODEL = ["model_name"]
REPLICA = ["model_name", "replica"]
TENANT = ["model_name", "tenant"]
OTHER = "other"
"""All tenants that are not named, so that a scrape does not grow with them; a tenant called so is counted here too."""
RESTARTS = ("failed", "hung", "lost")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReading:
    """What one scrape shows."""

    redis_up: bool
    models: Mapping[str, FleetStatus]
    refusals: Mapping[tuple[str, str, str], int]
    """By model, tenant and reason."""
    web_processes: int = 0
    history_waiting: int = 0
    """Entries of the history stream that the database does not have yet."""
    tenants: Sequence[str] = ()
    """Those with a name of their own."""
    time_s: float = 0.0
    alerts: Sequence[tuple[str, str, int]] | None = None
    """Rules with their severity and how many of their alerts fire; None where nobody has judged them lately."""


def render_metrics(reading: FleetReading) -> bytes:
    """A reading in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(reading))
    return generate_latest(registry)


class FleetCollector(Collector):
    """Turns a reading into metric families. Labels are models, replicas, fixed words, and a bound on tenants."""

    def __init__(self, reading: FleetReading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        """Every family once."""
        yield GaugeMetricFamily(
            PREFIX + "redis_up", "Whether Redis answered this scrape.", float(self._reading.redis_up)
        )
        yield GaugeMetricFamily(PREFIX + "web_processes", "Live web processes.", self._reading.web_processes)
        yield GaugeMetricFamily(
            PREFIX + "history_waiting", "Entries that the database lacks yet.", self._reading.history_waiting
        )
        yield _build()
        yield from self._alerts()
        yield from self._queues()
        yield from self._totals()
        yield from self._refusals()
        yield from self._tenants()
        replicas = [replica for status in self._reading.models.values() for replica in status.replicas]
        yield from _replica_gauges(replicas)
        yield from _replica_counters(replicas)
        yield from _latencies(replicas)
        yield from _devices(replicas)

    def _alerts(self) -> Iterator[Metric]:
        """None at all where the ops worker is away: an old count would say that nothing fires."""
        if self._reading.alerts is not None:
            firing = _gauge("alerts_firing", "Alerts that fire, by rule.", ["rule", "severity"])
            for rule, severity, num in self._reading.alerts:
                firing.add_metric([rule, severity], num)
            yield firing

    def _queues(self) -> Iterator[Metric]:
        running = _gauge("num_requests_running", "Requests in a batch.", MODEL)
        waiting = _gauge("num_requests_waiting", "Requests in the queue.", MODEL)
        by_priority = _gauge("num_requests_waiting_by_priority", "Requests in the queue.", [*MODEL, "priority"])
        level = _gauge("backpressure_level", "Backpressure, 0 (none) to 4 (critical).", MODEL)
        kv_usage = _gauge("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", MODEL)
        revision = _gauge("policy_revision", "Revision of the active policy.", [*MODEL, "policy"])
        oldest = _gauge("oldest_request_age_seconds", "How long the oldest request in the queue has waited.", MODEL)
        tokens = _gauge("num_tokens_waiting", "Tokens in the queue, prompts and max_tokens.", MODEL)
        for model, status in self._reading.models.items():
            snapshot = status.snapshot
            if snapshot is None:
                continue
            running.add_metric([model], snapshot.running)
            waiting.add_metric([model], snapshot.depth)
            tokens.add_metric([model], snapshot.waiting_tokens)
            arrived_s = snapshot.oldest_arrival_s
            oldest.add_metric([model], 0.0 if arrived_s is None else max(0.0, self._reading.time_s - arrived_s))
            for priority in Priority:
                by_priority.add_metric([model, priority.name.lower()], snapshot.by_priority.get(priority, 0))
            level.add_metric([model], status.assessment.level)
            kv_usage.add_metric([model], status.kv_usage)
            revision.add_metric([model, snapshot.policy], snapshot.revision)
        yield from (running, waiting, tokens, oldest, by_priority, level, kv_usage, revision)

    def _totals(self) -> Iterator[Metric]:
        """What a queue has counted since it began."""
        families = {
            "enqueued_total": _counter("requests_enqueued", "Requests put into the queue.", MODEL),
            "claimed_total": _counter("requests_claimed", "Requests taken out by a worker.", MODEL),
            "finished_total": _counter("requests_finished", "Requests ended by a worker, however they ended.", MODEL),
            "requeued_total": _counter(
                "requests_requeued", "Requests put back after a worker was lost or drained.", MODEL
            ),
            "cancelled_total": _counter("requests_cancelled_waiting", "Requests cancelled in the queue.", MODEL),
            "shed_total": _counter("requests_shed", "Requests dropped for others of higher priority.", MODEL),
            "expired_total": _counter("requests_expired", "Requests dropped since their deadline had passed.", MODEL),
        }
        for model, status in self._reading.models.items():
            if status.snapshot is not None:
                for field, family in families.items():
                    family.add_metric([model], getattr(status.snapshot, field))
        yield from families.values()

    def _refusals(self) -> Iterator[Metric]:
        refused = _counter("requests_refused", "Requests refused at admission.", [*TENANT, "reason"])
        sums: Counter[tuple[str, str, str]] = Counter()
        for (model, tenant, reason), count in self._reading.refusals.items():
            sums[model, self._name(tenant), reason] += count
        for labels, count in sums.items():
            refused.add_metric(labels, count)
        yield refused

    def _tenants(self) -> Iterator[Metric]:
        waiting = _gauge("num_requests_waiting_by_tenant", "Requests in the queue.", TENANT)
        running = _gauge("num_requests_running_by_tenant", "Requests in a batch.", TENANT)
        for model, status in self._reading.models.items():
            in_queue = status.snapshot.by_tenant if status.snapshot is not None else {}
            in_batch = Counter(slot.tenant for replica in status.replicas for slot in replica.slots)
            for family, counts in ((waiting, in_queue), (running, in_batch)):
                for tenant, count in self._sum_up(counts.items()).items():
                    family.add_metric([model, tenant], count)
        yield from (waiting, running)

    def _sum_up(self, counts: Iterable[tuple[str, int]]) -> dict[str, int]:
        """A count for each tenant with a name, 0 included, and one for the others."""
        sums = dict.fromkeys([*self._reading.tenants, OTHER], 0)
        for tenant, count in counts:
            sums[self._name(tenant)] += count
        return sums

    def _name(self, tenant: str) -> str:
        return tenant if tenant in self._reading.tenants else OTHER


def _replica_gauges(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    state = _gauge("replica_state", "1 for the state the replica is in.", [*REPLICA, "state"])
    batch = _gauge("batch_size", "Sequences in the running batch.", REPLICA)
    rate = _gauge("generation_tokens_per_second", "Output tokens a second over the last second.", REPLICA)
    step = _gauge("step_time_seconds", "Time of an engine step, over the last 512.", [*REPLICA, "quantile"])
    simple = {
        "max_batch_size": _gauge("batch_size_max", "Sequences that a batch may hold.", REPLICA),
        "batch_tokens": _gauge("batch_tokens", "Context tokens of the running batch.", REPLICA),
        "kv_blocks_used": _gauge("kv_blocks_used", "KV blocks in use.", REPLICA),
        "kv_blocks_total": _gauge("kv_blocks", "KV blocks there are.", REPLICA),
        "overhead_percent": _gauge("engine_overhead_percent", "Busy time outside the forward pass.", REPLICA),
        "started_s": _gauge("replica_start_time_seconds", "When the engine process began, unix time.", REPLICA),
    }
    for replica in replicas:
        labels = [replica.model, replica.replica]
        for name in get_args(ReplicaState):
            state.add_metric([*labels, name], float(replica.state == name))
        batch.add_metric(labels, len(replica.slots))
        for field, family in simple.items():
            family.add_metric(labels, getattr(replica, field))
        rate.add_metric(labels, replica.tokens_per_s)
        step.add_metric([*labels, "0.5"], replica.step_ms_p50 / 1000)
        step.add_metric([*labels, "0.99"], replica.step_ms_p99 / 1000)
    yield from (state, batch, rate, step, *simple.values())


def _replica_counters(replicas: Sequence[ReplicaStatus]) -> Iterator[Metric]:
    prompt = _counter("prompt_tokens", "Prompt tokens computed.", REPLICA)
    generated = _counter("generation_tokens", "Output tokens sampled.", REPLICA)
    preempted = _counter("num_preemptions", "Sequences preempted for memory.", REPLICA)
    ended = _counter("request_success", "Requests ended, by finish reason.", [*REPLICA, "finished_reason"])
    steps = _counter("engine_steps", "Engine steps.", REPLICA)
    restarts = _counter("engine_restarts", "Engine processes started again, by reason.", [*REPLICA, "reason"])
    prefix = _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", REPLICA)
    hits = _counter("prefix_cache_hits", "Prompt tokens found there.", REPLICA)
    drafted = _counter("spec_decode_num_draft_tokens", "Guessed tokens that were verified.", REPLICA)
    accepted = _counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.", REPLICA)
    for replica in replicas:
        labels = [replica.model, replica.replica]
        prompt.add_metric(labels, replica.prompt_tokens)
        generated.add_metric(labels, replica.output_tokens)
        preempted.add_metric(labels, replica.preemptions)
        steps.add_metric(labels, replica.steps)
        prefix.add_metric(labels, replica.prefix_tokens)
        hits.add_metric(labels, replica.prefix_hit_tokens)
        drafted.add_metric(labels, replica.draft_tokens)
        accepted.add_metric(labels, replica.accepted_tokens)
        for reason in RESTARTS:
            restarts.add_metric([*labels, reason], replica.restarts.get(reason, 0))
        for reason, count in replica.finished.items():
            ended.add_metric([*labels, reason], count)
    yield from (prompt, generated, preempted, ended, steps, restarts, prefix, hits, drafted, accepted)


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
    """Figures of a stale reading are left out; that it is stale, or the device lost, is not."""
    labels = [*REPLICA, "device", "source"]
    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
        "utilization_percent": _gauge("device_utilization_percent", "Utilisation of the device.", labels),
        "memory_used_bytes": _gauge("device_memory_used_bytes", "Memory in use.", labels),
        "memory_total_bytes": _gauge("device_memory_total_bytes", "Memory there is.", labels),
        "process_memory_bytes": _gauge("device_process_memory_bytes", "Memory of the engine process itself.", labels),
        "temperature_c": _gauge("device_temperature_celsius", "Temperature.", labels),
        "power_w": _gauge("device_power_watts", "Power drawn.", labels),
        "power_limit_w": _gauge("device_power_limit_watts", "Power that may be drawn.", labels),
        "sm_clock_mhz": _gauge("device_sm_clock_mhz", "Clock of the multiprocessors.", labels),
        "memory_clock_mhz": _gauge("device_memory_clock_mhz", "Clock of the memory.", labels),
        "ecc_corrected": _counter("device_ecc_corrected_errors", "ECC errors corrected.", labels),
        "ecc_uncorrected": _counter("device_ecc_uncorrected_errors", "ECC errors not corrected.", labels),
    }
    stale = _gauge("device_telemetry_stale_seconds", "Age of a reading whose successor is overdue; else 0.", labels)
    lost = _gauge("device_lost", "1 where the GPU is lost.", labels)
    throttled = _gauge("device_throttled", "1 for each reason for which clocks are held down.", [*labels, "reason"])
    for replica in replicas:
        telemetry = replica.telemetry
        if telemetry is None:
            continue
        values = [replica.model, replica.replica, telemetry.device, telemetry.source]
        stale.add_metric(values, telemetry.stale_s)
        lost.add_metric(values, float(telemetry.lost))
        _add_figures(families, throttled, values, telemetry)
    yield from (*families.values(), stale, lost, throttled)


def _add_figures(
    families: Mapping[str, GaugeMetricFamily | CounterMetricFamily],
    throttled: GaugeMetricFamily,
    labels: list[str],
    telemetry: Telemetry,
) -> None:
    if telemetry.stale_s:
        return
    for field, family in families.items():
        if (value := getattr(telemetry, field)) is not None:
            family.add_metric(labels, value)
    for reason in telemetry.throttle_reasons:
        throttled.add_metric([*labels, reason], 1)


def _build() -> Metric:
    family = _gauge("build_info", "1, with the version.", ["version"])
    family.add_metric([VERSION], 1)
    return family


def _gauge(name: str, text: str, labels: Sequence[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def _counter(name: str, text: str, labels: Sequence[str]) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, LATENCY_BUCKETS_S), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
