"""What a scrape shows of replicas: vLLM's names, cumulative buckets, bounded labels."""

from prometheus_client.parser import text_string_to_metric_families

from controlplane.metrics import FleetReading, render_metrics
from inference.gateway.monitor import FleetStatus
from inference.messages import LATENCY_BUCKETS_S, Histogram, ReplicaStatus, Telemetry
from scheduling.core.answers import QueueSnapshot

COUNTS = list(range(len(LATENCY_BUCKETS_S) + 1))


def scrape() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    replica = ReplicaStatus(
        replica="gpu-0",
        model="m",
        host="h",
        pid=1,
        state="ready",
        time_s=1.0,
        started_s=0.0,
        kv_blocks_total=100,
        kv_blocks_used=25,
        output_tokens=7,
        finished={"stop": 3, "length": 2},
        telemetry=Telemetry(source="host", device="cpu", utilization_percent=50.0),
        time_to_first_token=Histogram(COUNTS, 12.5),
    )
    status = FleetStatus(time_s=1.0, snapshot=QueueSnapshot(depth=4, by_priority={3: 4}), replicas=[replica])
    reading = FleetReading(redis_up=True, models={"m": status}, refusals={("m", "queue_full"): 2}, web_processes=3)
    text = render_metrics(reading).decode()
    return {
        (sample.name.removeprefix("penstock_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_queue_and_replica_are_shown() -> None:
    samples = scrape()
    model, replica = ("model_name", "m"), ("replica", "gpu-0")
    assert samples["num_requests_waiting", (model,)] == 4
    assert samples["num_requests_waiting_by_priority", (model, ("priority", "normal"))] == 4
    assert samples["kv_cache_usage_perc", (model,)] == 0.25
    assert samples["requests_refused_total", (model, ("reason", "queue_full"))] == 2
    assert samples["request_success_total", (("finished_reason", "stop"), model, replica)] == 3
    assert samples["replica_state", (model, replica, ("state", "ready"))] == 1
    assert samples["replica_state", (model, replica, ("state", "failed"))] == 0
    assert samples["generation_tokens_total", (model, replica)] == 7


def test_histograms_are_cumulative_to_infinity() -> None:
    samples = scrape()
    labels = (("model_name", "m"), ("replica", "gpu-0"))
    name = "time_to_first_token_seconds"
    assert samples[f"{name}_sum", labels] == 12.5
    assert samples[f"{name}_count", labels] == sum(COUNTS)
    buckets = {dict(key)["le"]: value for (sample, key), value in samples.items() if sample == f"{name}_bucket"}
    assert buckets["+Inf"] == sum(COUNTS)
    assert buckets[str(LATENCY_BUCKETS_S[2])] == sum(COUNTS[:3])


def test_what_a_device_cannot_say_is_left_out() -> None:
    names = {name for name, _ in scrape()}
    assert "device_utilization_percent" in names
    assert "device_power_watts" not in names
