"""Writes dashboards/penstock.json from the list of panels below: `python deploy/grafana/make_dashboard.py`."""

import json
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "penstock.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
FLEET = 'model_name=~"$model"'
"""Every web process shows the whole fleet, so `max by` takes one of their series before anything is summed."""


def latency(name: str) -> list[tuple[str, str]]:
    """p50 and p99 of a histogram."""
    buckets = f"sum by (le) (rate(penstock_{name}_bucket{{{FLEET}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {buckets})", f"p{q[2:].ljust(2, '0')}") for q in ("0.5", "0.99")]


def by(labels: str, name: str, more: str = "") -> str:
    """One of the web processes' equal series."""
    return f"max by ({labels}) (penstock_{name}{{{FLEET}{more}}})"


def rate(labels: str, name: str) -> str:
    """A counter of replicas, a second."""
    counters = f"max by ({labels}, replica) (rate(penstock_{name}{{{FLEET}}}[$__rate_interval]))"
    return f"sum by ({labels}) ({counters})"


DEVICE = "replica, device"
ROWS: list[tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]] = [
    (
        "Queue",
        [
            ("Waiting, by priority", "short", [(by("priority", "num_requests_waiting_by_priority"), "{{priority}}")]),
            ("Waiting, by tenant", "short", [(by("tenant", "num_requests_waiting_by_tenant"), "{{tenant}}")]),
            ("Oldest request", "s", [(by("model_name", "oldest_request_age_seconds"), "{{model_name}}")]),
            ("Backpressure", "short", [(by("model_name", "backpressure_level"), "{{model_name}}")]),
            (
                "In and out",
                "reqps",
                [
                    (f"max by (model_name) (rate(penstock_requests_{name}_total{{{FLEET}}}[$__rate_interval]))", name)
                    for name in ("enqueued", "claimed", "finished", "shed", "expired", "requeued")
                ],
            ),
            (
                "Refused",
                "reqps",
                [
                    (
                        "sum by (tenant, reason) (max by (model_name, tenant, reason) "
                        f"(rate(penstock_requests_refused_total{{{FLEET}}}[$__rate_interval])))",
                        "{{tenant}} {{reason}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Latency",
        [
            ("Time to first token", "s", latency("time_to_first_token_seconds")),
            ("Time per output token", "s", latency("time_per_output_token_seconds")),
            ("Time in queue", "s", latency("request_queue_time_seconds")),
            ("End to end", "s", latency("e2e_request_latency_seconds")),
        ],
    ),
    (
        "Engines",
        [
            (
                "Batch",
                "short",
                [
                    (by("replica", "batch_size"), "{{replica}}"),
                    (by("replica", "batch_size_max"), "{{replica}} at most"),
                ],
            ),
            ("Output tokens", "short", [(rate("model_name", "generation_tokens_total"), "{{model_name}}")]),
            ("Prompt tokens", "short", [(rate("model_name", "prompt_tokens_total"), "{{model_name}}")]),
            ("Step time", "s", [(by("replica, quantile", "step_time_seconds"), "{{replica}} {{quantile}}")]),
            ("KV cache in use", "percentunit", [(by("model_name", "kv_cache_usage_perc"), "{{model_name}}")]),
            ("Preemptions", "ops", [(rate("model_name", "num_preemptions_total"), "{{model_name}}")]),
            ("Ended", "reqps", [(rate("finished_reason", "request_success_total"), "{{finished_reason}}")]),
            (
                "Started again, last hour",
                "short",
                [
                    (
                        f"max by (replica, reason) (increase(penstock_engine_restarts_total{{{FLEET}}}[1h]))",
                        "{{replica}} {{reason}}",
                    )
                ],
            ),
        ],
    ),
    (
        "Devices",
        [
            ("Utilisation", "percent", [(by(DEVICE, "device_utilization_percent"), "{{replica}}")]),
            ("Memory", "bytes", [(by(DEVICE, "device_memory_used_bytes"), "{{replica}}")]),
            ("Temperature", "celsius", [(by(DEVICE, "device_temperature_celsius"), "{{replica}}")]),
            ("Power", "watt", [(by(DEVICE, "device_power_watts"), "{{replica}}")]),
            ("Clock", "rotmhz", [(by(DEVICE, "device_sm_clock_mhz"), "{{replica}}")]),
            ("Throttled", "short", [(by("replica, reason", "device_throttled"), "{{replica}} {{reason}}")]),
            ("Lost", "short", [(by("replica", "device_lost"), "{{replica}}")]),
            ("Telemetry overdue", "s", [(by("replica", "device_telemetry_stale_seconds"), "{{replica}}")]),
        ],
    ),
]


def make_panel(number: int, title: str, unit: str, targets: list[tuple[str, str]], x: int, y: int) -> dict[str, Any]:
    """A chart, a quarter of the page wide."""
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": 6, "h": 7},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(65 + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(targets)
        ],
    }


def make_dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, charts in ROWS:
        grid = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": grid, "panels": []})
        y += 1
        for i, (name, unit, targets) in enumerate(charts):
            panels.append(make_panel(len(panels) + 1, name, unit, targets, 6 * (i % 4), y + 7 * (i // 4)))
        y += 7 * -(-len(charts) // 4)
    query = "label_values(penstock_num_requests_waiting, model_name)"
    model = {
        "name": "model", "label": "Model", "type": "query", "datasource": SOURCE, "query": query, "refresh": 2,
        "multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"},
    }  # fmt: skip
    return {
        "uid": "penstock",
        "title": "Penstock",
        "schemaVersion": 41,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [model]},
        "panels": panels,
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(make_dashboard(), indent=1) + "\n")
