"""What a scrape shows: vLLM's names, cumulative buckets, bounded labels, devices that are stale or lost."""

import tomllib
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from controlplane import VERSION
from controlplane.config import ROOT
from controlplane.metric_families import FleetReading, render_metrics
from inference.gateway.monitor import FleetStatus
from inference.messages import LATENCY_BUCKETS_S, Histogram, ReplicaStatus, Slot, Telemetry
from scheduling.core.answers import QueueSnapshot

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
COUNTS = list(range(len(LATENCY_BUCKETS_S) + 1))


def make_replica(**fields: Any) -> ReplicaStatus:
    known: dict[str, Any] = {
        "replica": "gpu-0",
        "model": "m",
        "host": "h",
        "pid": 1,
        "state": "ready",
        "time_s": 1.0,
        "started_s": 0.0,
    }
    return ReplicaStatus(**(known | fields))


def scrape(replica: ReplicaStatus | None = None, **fields: Any) -> Samples:
    """Samples by name and labels."""
    replica = replica or make_replica(
        kv_blocks_total=100,
        kv_blocks_used=25,
        output_tokens=7,
        draft_tokens=9,
        accepted_tokens=6,
        finished={"stop": 3, "length": 2},
        restarts={"hung": 2},
        slots=[Slot("r1", "acme", 3, 1, 1, 9), Slot("r2", "tail", 3, 1, 1, 9)],
        telemetry=Telemetry(source="host", device="cpu", utilization_percent=50.0),
        time_to_first_token=Histogram(COUNTS, 12.5),
    )
    tenants = {"acme": 2, "beta": 1, "tail": 1}
    snapshot = QueueSnapshot(depth=4, by_priority={3: 4}, by_tenant=tenants, oldest_arrival_s=90.0, shed_total=6)
    status = FleetStatus(time_s=1.0, snapshot=snapshot, replicas=[replica])
    refusals = {("m", "acme", "queue_full"): 2, ("m", "tail", "queue_full"): 3, ("m", "beta", "queue_full"): 4}
    known: dict[str, Any] = {
        "redis_up": True,
        "models": {"m": status},
        "refusals": refusals,
        "web_processes": 3,
        "time_s": 100.0,
    }
    text = render_metrics(FleetReading(**(known | {"tenants": ["acme"]} | fields))).decode()
    return {
        (sample.name.removeprefix("penstock_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def by_tenant(samples: Samples, name: str) -> dict[str, float]:
    return {dict(labels)["tenant"]: value for (found, labels), value in samples.items() if found == name}


def test_queue_and_replica_are_shown() -> None:
    samples = scrape()
    model, replica = ("model_name", "m"), ("replica", "gpu-0")
    assert samples["num_requests_waiting", (model,)] == 4
    assert samples["num_requests_waiting_by_priority", (model, ("priority", "normal"))] == 4
    assert samples["kv_cache_usage_perc", (model,)] == 0.25
    assert samples["oldest_request_age_seconds", (model,)] == 10
    assert samples["requests_shed_total", (model,)] == 6
    assert samples["engine_restarts_total", (model, ("reason", "hung"), replica)] == 2
    assert samples["request_success_total", (("finished_reason", "stop"), model, replica)] == 3
    assert samples["replica_state", (model, replica, ("state", "ready"))] == 1
    assert samples["replica_state", (model, replica, ("state", "failed"))] == 0
    assert samples["generation_tokens_total", (model, replica)] == 7
    assert samples["spec_decode_num_draft_tokens_total", (model, replica)] == 9
    assert samples["spec_decode_num_accepted_tokens_total", (model, replica)] == 6


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


def test_tenants_beyond_the_bound_are_one_other() -> None:
    samples = scrape()
    assert by_tenant(samples, "num_requests_waiting_by_tenant") == {"acme": 2, "other": 2}
    assert by_tenant(samples, "num_requests_running_by_tenant") == {"acme": 1, "other": 1}
    assert by_tenant(samples, "requests_refused_total") == {"acme": 2, "other": 7}
    assert by_tenant(scrape(tenants=[]), "requests_refused_total") == {"other": 9}


def test_a_stale_device_shows_its_age_and_no_old_figures() -> None:
    stale = Telemetry(source="nvml", device="A1", utilization_percent=50.0, ecc_corrected=7, stale_s=4.5)
    samples = scrape(make_replica(telemetry=stale))
    labels = (("device", "A1"), ("model_name", "m"), ("replica", "gpu-0"), ("source", "nvml"))
    assert samples["device_telemetry_stale_seconds", labels] == 4.5
    assert not {"device_utilization_percent", "device_ecc_corrected_errors_total"} & {name for name, _ in samples}


def test_a_lost_device_and_a_throttled_one_can_be_alerted_on() -> None:
    lost = Telemetry(source="nvml", device="A1", lost=True, throttle_reasons=["power cap"], sm_clock_mhz=210.0)
    samples = scrape(make_replica(telemetry=lost, state="failed"))
    labels = (("device", "A1"), ("model_name", "m"), ("replica", "gpu-0"), ("source", "nvml"))
    assert samples["device_lost", labels] == 1
    assert samples["device_sm_clock_mhz", labels] == 210
    assert samples["device_throttled", tuple(sorted([*labels, ("reason", "power cap")]))] == 1


def test_the_version_is_the_project_s() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION
    assert scrape()["build_info", (("version", VERSION),)] == 1
